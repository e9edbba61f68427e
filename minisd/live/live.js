// The page's side: it starts the worker, fetches a model, and turns the worker's messages into promises.
//
//     const engine = new MinisdEngine("model");                       a folder beside the page
//     await engine.load((received, total) => …);                      the weights are fetched here, and not before
//     const { picture, seconds } = await engine.draw({ prompt: "a red fox", … }, { start, step });
//     engine.cancel();                                                 then the promise of `draw` gives null
//
// All options and answers are those of worker.js. Everything that fails, fails with one sentence for a person.
(() => {
  "use strict";
  const PARTS = ["gemm", "layers", "attention", "unet", "clip", "vae", "noising", "sampling", "safetensors", "tokenizer",
    "latent_diffusion", "worker"]; // prettier-ignore

  class MinisdEngine {
    // plain: compute without WebAssembly, as a browser without its SIMD does.
    constructor(folder, { plain = false } = {}) {
      Object.assign(this, { folder, plain });
      this.waiting = new Map(); // by id: what is to be called with the answers
      this.ids = 0;
    }

    // Fetch the model and hand it to the worker. A second call gives the same promise.
    load(progress = () => {}) {
      this.loaded ??= (async () => {
        const worker = this.start();
        const model = await readModel(this.folder, progress);
        return this.ask("load", model, {}, worker, model.weights);
      })();
      return this.loaded;
    }

    // A worker from the texts of the engine's files. A file: page may not start one from a file, but from a Blob it may.
    start() {
      const parts = globalThis.minisdLive ?? [];
      const missing = PARTS.filter((name) => !parts.some((part) => part.name === name));
      if (missing.length || !globalThis.Worker)
        throw new Error(`This browser can't run the model (${missing[0] ?? "Worker"} is missing): a newer one is needed.`);
      const list = PARTS.map((name) => parts.find((part) => part.name === name)).join(",\n");
      const text = `"use strict"; const live = { plain: ${this.plain} }; [${list}].forEach((part) => part(live));`;
      this.worker = new Worker(URL.createObjectURL(new Blob([text], { type: "text/javascript" })));
      this.worker.onmessage = ({ data }) => this.waiting.get(data.id)?.(data);
      // An error outside of any request, such as a policy of the server that forbids workers: nothing will be answered.
      this.worker.onerror = (event) => {
        const message = `The model's worker failed: ${event.message ?? "the browser did not start it"}.`;
        this.waiting.forEach((answer) => answer({ type: "error", message }));
      };
      return this.worker;
    }

    // Send a request; {type: function} are called with the answers on the way, and the promise gives the last one.
    ask(type, content, on = {}, worker = this.worker, transfer = []) {
      const id = ++this.ids;
      const promise = new Promise((resolve, reject) => {
        this.waiting.set(id, (answer) => {
          if (on[answer.type]) return on[answer.type](answer);
          this.waiting.delete(id);
          if (answer.type === "error") reject(new Error(answer.message));
          else resolve(answer.type === "cancelled" ? null : answer);
        });
      });
      worker.postMessage({ type, id, ...content }, transfer);
      return Object.assign(promise, { id });
    }

    draw(options, { start = () => {}, step = () => {} } = {}) {
      return this.ask("draw", options, { start, step });
    }

    // Stop one drawing, or all of them.
    cancel(id = null) {
      for (const each of id === null ? this.waiting.keys() : [id]) this.worker?.postMessage({ type: "cancel", id: each });
    }
  }

  // --- where a model comes from ---------------------------------------------------------------------------------------

  // From a server, the files of a minisd folder as they are. From a file, or where there is no such folder, the script
  // that minisd/live/__init__.py makes of them, because a page that was opened as a file may load scripts, but no data.
  async function readModel(folder, progress) {
    const config = location.protocol === "file:" ? null : await fetch(`${folder}/config.json`).catch(() => null);
    if (!config?.ok) return readScript(folder);
    const get = async (name) => {
      const answer = await fetch(`${folder}/${name}`);
      if (!answer.ok) throw new Error(`The server has no ${folder}/${name} (${answer.status}).`);
      return answer;
    };
    const tokenizer = {
      vocab: await (await get("tokenizer/vocab.json")).json(),
      merges: await (await get("tokenizer/merges.txt")).text(),
      config: await (await get("tokenizer/tokenizer_config.json")).json(),
    };
    const answer = await get("model.safetensors");
    const total = Number(answer.headers.get("Content-Length"));
    const chunks = [];
    let received = 0;
    for (const reader = answer.body.getReader(); ; ) {
      const { done, value } = await reader.read();
      if (done) break;
      chunks.push(value);
      progress((received += value.length), total);
    }
    return { config: await config.json(), tokenizer, weights: [joined(chunks)] };
  }

  async function readScript(folder) {
    await new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = `${folder}/model.js`;
      script.onload = () => resolve(script.remove());
      script.onerror = () => reject(new Error(`There is no model in ${folder}: neither config.json nor model.js.`));
      document.head.append(script);
    });
    const { weights, ...model } = globalThis.minisdModel;
    globalThis.minisdModel = null; // so that its text, which is larger than the weights, can be freed
    return { ...model, weights: [joined(weights.map(fromBase64))] };
  }

  function fromBase64(text) {
    const letters = atob(text);
    const bytes = new Uint8Array(letters.length);
    for (let k = 0; k < bytes.length; k++) bytes[k] = letters.charCodeAt(k);
    return bytes;
  }

  // One ArrayBuffer.
  function joined(chunks) {
    const bytes = new Uint8Array(chunks.reduce((sum, chunk) => sum + chunk.length, 0));
    let at = 0;
    for (const chunk of chunks) {
      bytes.set(chunk, at);
      at += chunk.length;
    }
    return bytes.buffer;
  }

  globalThis.MinisdEngine = MinisdEngine;
})();
