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
        this.start();
        const model = await readModel(this.folder, progress);
        return this.ask("load", model, {}, model.weights);
      })();
      return this.loaded;
    }

    // A worker from the texts of the engine's files. A file: page may not start one from a file, but from a Blob it may.
    start() {
      const parts = globalThis.minisdLive ?? [];
      // A browser that can't read one of the files has left it out.
      if (parts.length < 12 || !globalThis.Worker) throw new Error("This browser is too old to run the model. Use a newer one.");
      const text = `"use strict"; const live = { plain: ${this.plain} }; [${parts.join(",")}].forEach((part) => part(live));`;
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
    ask(type, content, on = {}, transfer = []) {
      const id = ++this.ids;
      const promise = new Promise((resolve, reject) => {
        this.waiting.set(id, (answer) => {
          if (on[answer.type]) return on[answer.type](answer);
          this.waiting.delete(id);
          if (answer.type === "error") reject(new Error(answer.message));
          else resolve(answer.type === "cancelled" ? null : answer);
        });
      });
      this.worker.postMessage({ type, id, ...content }, transfer);
      return promise;
    }

    draw(options, { start = () => {}, step = () => {} } = {}) {
      return this.ask("draw", options, { start, step });
    }

    // Stop all drawings, also those that wait for their turn.
    cancel() {
      for (const id of this.waiting.keys()) this.worker.postMessage({ type: "cancel", id });
    }
  }

  // --- where a model comes from ---------------------------------------------------------------------------------------

  // From a server, the files of a minisd folder as they are. From a file, or where there is no such folder, the script
  // that minisd/live/__init__.py makes of them, because a page that was opened as a file may load scripts, but no data.
  async function readModel(folder, progress) {
    const config = location.protocol === "file:" ? null : await fetch(`${folder}/config.json`);
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
    const chunks = [];
    let received = 0;
    for (const reader = answer.body.getReader(); ; ) {
      const { done, value } = await reader.read();
      if (done) break;
      chunks.push(value);
      progress((received += value.length), Number(answer.headers.get("Content-Length")));
    }
    return { config: await config.json(), tokenizer, weights: [await new Blob(chunks).arrayBuffer()] };
  }

  async function readScript(folder) {
    await new Promise((resolve, reject) => {
      const script = Object.assign(document.createElement("script"), { src: `${folder}/model.js`, onload: resolve });
      script.onerror = () => reject(new Error(`There is no model in ${folder}: neither config.json nor model.js.`));
      document.head.append(script);
    });
    const { weights, ...model } = globalThis.minisdModel;
    globalThis.minisdModel = null; // so that its text, which is larger than the weights, can be freed
    // The browser decodes base64 fastest as an address that holds its own content.
    const chunks = weights.map(async (text) => (await fetch(`data:;base64,${text}`)).arrayBuffer());
    return { ...model, weights: [await new Blob(await Promise.all(chunks)).arrayBuffer()] };
  }

  globalThis.MinisdEngine = MinisdEngine;
})();
