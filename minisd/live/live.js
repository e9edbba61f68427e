// The page's side: it starts the worker, fetches a model, and turns the worker's messages into promises.
//
//     const engine = new MinisdEngine("model");                       a folder beside the page
//     await engine.load((received, total) => …);                      the weights are fetched here, and not before.
//                                                  How much of how much: bytes from a server, pieces from a file
//     const { picture, seconds } = await engine.draw({ prompt: "a red fox", … }, { start, step });
//     engine.cancel();                                                 then the promise of `draw` gives null
//
// All options and answers are those of worker.js. Everything that fails, fails with one sentence for a person.
globalThis.MinisdEngine = class {
  // plain: compute without WebAssembly, as a browser without its SIMD does.
  constructor(folder, { plain = false } = {}) {
    // waiting: for each request by its id, what is called with the answers
    Object.assign(this, { folder, plain, waiting: new Map(), ids: 0 });
  }

  // Fetch the model and hand it to the worker. A second call gives the same promise, unless the first has failed.
  load(progress = () => {}) {
    const begin = async () => this.ask("load", (this.model = await this.readModel(progress)));
    const failed = (error) => {
      this.loaded = null; // it can be tried again
      throw error;
    };
    return (this.loaded ??= this.start() && begin().catch(failed));
  }

  // A worker from the texts of the engine's files. A page that is a file may start one from a Blob, but from no file.
  start() {
    // A browser that can't read one of the files has left it out.
    if (globalThis.minisdLive?.length !== 12 || !globalThis.Worker)
      throw new Error("This browser is too old for the model: use a newer one.");
    const text = `[${minisdLive}].reduce((live, part) => ({ ...live, ...part(live) }), { plain: ${this.plain} });`;
    const script = new Blob(['"use strict";', text], { type: "text/javascript" });
    this.worker = new Worker(URL.createObjectURL(script));
    this.worker.onmessage = ({ data }) => this.waiting.get(data.id)?.(data);
    // An error outside of any request, such as a policy of the server that forbids workers: nothing will be answered.
    this.worker.onerror = ({ message = "the browser did not start it" }) => {
      this.waiting.forEach((answer) => answer({ type: "error", message: `The model's worker failed: ${message}.` }));
    };
    return this.worker;
  }

  // Send a request. on: {type: function}, called with the answers on the way. The promise gives the last one.
  ask(type, content, on = {}) {
    const id = ++this.ids;
    this.worker.postMessage({ type, id, ...content }, type === "load" ? content.weights : []);
    const promise = new Promise((resolve, reject) => {
      const error = ({ message }) => reject(new Error(message));
      const answers = { start() {}, step() {}, error, cancelled: () => resolve(null), ...on };
      this.waiting.set(id, (answer) => (answers[answer.type] ?? resolve)(answer));
    });
    return promise.finally(() => this.waiting.delete(id));
  }

  draw = (options, on) => this.ask("draw", options, on);

  // Stop all drawings, also those that wait for their turn.
  cancel = () => this.waiting.forEach((_, id) => this.worker.postMessage({ type: "cancel", id }));

  // --- where a model comes from --------------------------------------------------------------------------------------

  // From a server, the files of a minisd folder as they are. From a file, or where there is no such folder, the scripts
  // that minisd/live/__init__.py makes of them, because a page that was opened as a file may load scripts, but no data.
  async readModel(progress) {
    const first = location.protocol === "file:" ? null : await fetch(`${this.folder}/config.json`);
    if (!first?.ok) return this.readScripts(progress);
    const get = async (name) => {
      const answer = await fetch(`${this.folder}/${name}`);
      if (!answer.ok) throw new Error(`The server has no ${this.folder}/${name} (${answer.status}).`);
      return answer;
    };
    const [config, vocab] = [await first.json(), await (await get("tokenizer/vocab.json")).json()];
    const merges = await (await get("tokenizer/merges.txt")).text();
    const special = await (await get("tokenizer/tokenizer_config.json")).json();
    const answer = await get("model.safetensors");
    let received = 0;
    const count = (chunk, out) => {
      progress((received += chunk.length), Number(answer.headers.get("Content-Length")));
      out.enqueue(chunk);
    };
    const counted = new Response(answer.body.pipeThrough(new TransformStream({ transform: count })));
    return { config, tokenizer: { vocab, merges, config: special }, weights: [await counted.arrayBuffer()] };
  }

  // Load a script of the model's folder, and return what it holds: it leaves that in globalThis.minisdModel.
  script = (name) =>
    new Promise((resolve, reject) => {
      const tag = Object.assign(document.createElement("script"), { src: `${this.folder}/${name}` });
      tag.onload = () => resolve(globalThis.minisdModel);
      tag.onerror = () => reject(new Error(`There is no ${this.folder}/${name}.`));
      document.head.append(tag);
    });

  // Piece by piece into one buffer, because each exists several times in memory while it is read: as a file, a script
  // and a string.
  async readScripts(progress) {
    const { pieces, size, bytes, ...model } = await this.script("model.js");
    const weights = new Uint8Array(bytes);
    for (let i = 0; i < pieces; progress(++i, pieces))
      weights.set(MinisdEngine.bytes(await this.script(`weights_${i}.js`)), i * size);
    return { ...model, weights: [weights.buffer] };
  }

  // What base64 stands for. Browsers from before 2025 have only the slow way.
  static bytes = (base64) =>
    Uint8Array.fromBase64?.(base64) ?? Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
};
