// The engine's side of the conversation with the page. It runs in a worker, so that the page stays responsive.
//
// Every message is an object with a `type`. What the page says, and what it is answered:
//
//     load       {id, config, tokenizer: {vocab, merges, config}, weights: [ArrayBuffer, …]}     config.json and vocab.json as
//                objects, merges.txt as text; a tensor in a later file replaces that of an earlier one
//      ─► ready      {id, simd, image_size, max_length, samplers, timesteps: T, alphas_cumprod [T]}
//                    simd: false where the browser has no WebAssembly SIMD, so that a drawing takes longer
//     draw       {id, prompt, negative = "", steps = 50, guidance = 7.5, sampler = "ddim", seed = 0, init = null,
//                preview = 0, attention = false, activations = false, hide = []}
//                init: {rgba, width, height, strength} draws over a picture. preview: decode every k-th step. attention,
//                activations, hide: see LatentDiffusion.apply_model
//      ─► start      {id, shape [c h w], timesteps, tokens: {ids, pieces, lost}, context [d n], x_T}
//      ─► step       {id, i, t, a_t, a_prev, x_t, eps, eps_cond, eps_uncond, x0, x, attention, activations, pictures}
//                    arrays of the latent's shape. With a preview, pictures is {x_t, x0}
//      ─► done       {id, picture, seconds}
//     cancel     {id}          the drawing stops after the step that it is in, or does not begin
//      ─► cancelled  {id}      instead of `done`
//     tokenize   {id, prompt}                        ─► tokens      {id, ids, pieces, lost}
//     decode     {id, latents: [[c h w], …], shape}  ─► decoded     {id, pictures}
//     autoencode {id, rgba, width, height}           ─► autoencoded {id, mean, shape, picture}   what the autoencoder keeps
//
//      ─► error      {id, message}     in answer to any of them: one sentence, for a person
//
// A picture is {rgba, width, height}, as canvas' ImageData has it. Drawings run one after the other, in the order in which
// they were asked for. The other requests are answered between their steps. `id` may be anything; answers carry it back.
(globalThis.minisdLive ??= []).push(function worker(live) {
  let sd = null;
  let drawings = Promise.resolve(); // the last one that was asked for
  const cancelled = new Set();
  const say = (type, content) => globalThis.postMessage({ type, ...content });

  function load({ id, config, tokenizer, weights }) {
    sd = new live.LatentDiffusion(config, tokenizer, weights);
    const { image_size } = sd.config;
    const { max_length } = sd.cond_stage_model.config;
    say("ready", { id, simd: live.simd, image_size, max_length, samplers: Object.keys(live.SAMPLERS), ...sd.schedule });
  }

  async function draw({ id, preview = 0, init = null, ...options }) {
    const began = performance.now();
    let shape, last;
    for (const step of sd.draw({ ...options, init: init && { ...init, pixels: fromRGBA(init) } })) {
      // The messages that have arrived meanwhile are read here, one of which may be to cancel.
      await breath();
      if (cancelled.delete(id)) return say("cancelled", { id });
      if (!shape) say("start", { id, ...step });
      else {
        const [x_t, x0] = preview && (step.i + 1) % preview === 0 ? decode([step.x_t, step.x0], shape) : [];
        say("step", { id, ...step, pictures: x0 ? { x_t, x0 } : null });
      }
      shape ??= step.shape;
      last = step;
    }
    const [picture] = decode([last.x], shape);
    say("done", { id, picture, seconds: (performance.now() - began) / 1000 });
  }

  // Let the worker read its messages. (setTimeout would wait for 4 ms.)
  function breath() {
    return new Promise((resolve) => {
      const { port1, port2 } = new MessageChannel();
      port1.onmessage = () => resolve(port1.close());
      port2.postMessage(null);
    });
  }

  // --- pictures: [3 H W] in [-1, 1], and four bytes for each pixel ----------------------------------------------------

  function decode(latents, shape) {
    const f = sd.first_stage_model.downsampling;
    const [height, width] = [shape[1] * f, shape[2] * f];
    return sd.decode_first_stage(latents, shape).map((x) => ({ rgba: toRGBA(x), width, height }));
  }

  function toRGBA(x) {
    const size = x.length / 3;
    const rgba = new Uint8ClampedArray(4 * size).fill(255); // rounds as torch does, and clamps what the decoder overshoots
    for (let k = 0; k < 3 * size; k++) rgba[4 * (k % size) + Math.floor(k / size)] = (x[k] + 1) * 127.5;
    return rgba;
  }

  // What is transparent becomes white.
  function fromRGBA({ rgba, width, height }) {
    const size = width * height;
    const x = new Float32Array(3 * size);
    for (let k = 0; k < 3 * size; k++) {
      const at = 4 * (k % size);
      const [value, alpha] = [rgba[at + Math.floor(k / size)], rgba[at + 3] / 255];
      x[k] = Math.round(alpha * value + (1 - alpha) * 255) / 127.5 - 1;
    }
    return x;
  }

  function autoencode({ id, rgba, width, height }) {
    const shape = sd.latent_shape(height, width);
    const { mean } = sd.encode_first_stage(fromRGBA({ rgba, width, height }), height, width);
    const [picture] = decode([mean.map((v) => sd.config.scale_factor * v)], shape);
    say("autoencoded", { id, mean, shape, picture });
  }

  // --- messages ---------------------------------------------------------------------------------------------------

  const ANSWERS = {
    load,
    draw: (message) => (drawings = drawings.then(() => answered(draw, message))),
    cancel: ({ id }) => cancelled.add(id),
    tokenize: ({ id, prompt }) =>
      say("tokens", { id, ...sd.cond_stage_model.tokenizer.encode(prompt, sd.cond_stage_model.config.max_length) }),
    decode: ({ id, latents, shape }) => say("decoded", { id, pictures: decode(latents, shape) }),
    autoencode,
  };

  async function answered(answer, message) {
    try {
      if (!answer) throw new Error(`The engine knows no message "${message.type}": see worker.js.`);
      if (!sd && message.type !== "load") throw new Error("There is no model yet: send `load` first.");
      await answer(message);
    } catch (error) {
      say("error", { id: message.id, message: error.message });
    }
  }

  globalThis.onmessage = ({ data }) => answered(ANSWERS[data.type], data);
});
