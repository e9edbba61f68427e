// The engine's side of the conversation with the page. It runs in a worker, so that the page stays responsive.
//
// Every message is an object with a `type` and an `id`, which may be anything and which the answers carry back. What
// the page says, and what it is answered:
//
//     load       {config, tokenizer: {vocab, merges, config}, weights: [ArrayBuffer, …]}
//                config.json and vocab.json as objects, merges.txt as text, tokenizer_config.json as an object or
//                null; a tensor in a later file replaces that of an earlier one
//      ─► ready      {simd, image_size, max_length, samplers, timesteps: T, alphas_cumprod [T]}
//                    simd: false where the browser has no WebAssembly SIMD, so that a drawing takes much longer
//     draw       {prompt, negative = "", steps = 50, guidance = 7.5, sampler = "ddim", seed = 0, init = null,
//                preview = 0, attention = false, activations = false, hide = []}
//                init: {rgba, width, height, strength} draws over a picture. preview: decode every k-th step.
//                attention, activations, hide: see LatentDiffusion.apply_model
//      ─► start      {shape [c h w], timesteps, tokens: {ids, pieces, lost}, context [d n], x_T}
//      ─► step       {i, t, a_t, a_prev, x_t, eps, eps_cond, eps_uncond, x0, x, attention, activations, pictures}
//                    arrays of the latent's shape. With a preview, pictures is {x_t, x0}
//      ─► done       {picture, seconds}
//     cancel     {id of a drawing}    it stops after the step that it is in, or after its first
//      ─► cancelled  {}               instead of `done`
//     tokenize   {prompt}                        ─► tokens      {ids, pieces, lost}
//     decode     {latents: [[c h w], …], shape}  ─► decoded     {pictures}
//     autoencode {rgba, width, height}           ─► autoencoded {z [c h w], shape, picture}    what of it is kept
//
//      ─► error      {message}        in answer to any of them: one sentence, for a person
//
// A picture is {rgba, width, height}, as canvas' ImageData has it. Drawings run one after the other, in the order in
// which they were asked for. The other requests are answered between their steps.
minisdLive.push(function worker({ LatentDiffusion, SAMPLERS, simd }) {
  let sd = null;
  let drawings = Promise.resolve(); // the last one that was asked for
  const cancelled = new Set();
  const say = (type, content) => globalThis.postMessage({ type, ...content });

  function load({ id, config, tokenizer, weights }) {
    sd = new LatentDiffusion(config, tokenizer, weights);
    const [{ timesteps, alphas_cumprod }, { image_size }] = [sd.schedule, sd.config];
    const about = { image_size, max_length: sd.cond_stage_model.config.max_length, samplers: Object.keys(SAMPLERS) };
    say("ready", { id, simd, ...about, timesteps, alphas_cumprod });
  }

  async function draw({ id, preview = 0, init = null, ...options }) {
    const began = performance.now();
    const steps = sd.draw({ ...options, init: init && { ...init, pixels: fromRGBA(init) } });
    const start = steps.next().value;
    say("start", { id, ...start });
    let step;
    for (step of steps) {
      const [x_t, x0] = preview && (step.i + 1) % preview === 0 ? decode([step.x_t, step.x0], start.shape) : [];
      say("step", { id, ...step, pictures: x0 ? { x_t, x0 } : null });
      // The messages that have arrived meanwhile are read here, one of which may be to cancel.
      await new Promise((resolve) => setTimeout(resolve));
      if (cancelled.delete(id)) return say("cancelled", { id });
    }
    const [picture, seconds] = [decode([step.x], start.shape)[0], (performance.now() - began) / 1000];
    say("done", { id, picture, seconds });
  }

  // --- pictures: [3 H W] in [-1, 1], and four bytes for each pixel ---------------------------------------------------

  function decode(latents, shape) {
    const [height, width] = shape.slice(1).map((side) => side * sd.first_stage_model.downsampling);
    return sd.decode_first_stage(latents, shape).map((x) => {
      const size = height * width;
      const rgba = new Uint8ClampedArray(4 * size).fill(255); // clamps what the decoder overshoots, and rounds as torch
      for (let k = 0; k < 3 * size; k++) rgba[4 * (k % size) + Math.floor(k / size)] = (x[k] + 1) * 127.5;
      return { rgba, width, height };
    });
  }

  // What is transparent becomes white.
  function fromRGBA({ rgba, width, height }) {
    const size = width * height;
    return new Float32Array(3 * size).map((_, k) => {
      const [value, alpha] = [rgba[4 * (k % size) + Math.floor(k / size)], rgba[4 * (k % size) + 3] / 255];
      return Math.round(alpha * value + (1 - alpha) * 255) / 127.5 - 1;
    });
  }

  function autoencode({ id, width, height, ...picture }) {
    const shape = sd.latent_shape(height, width);
    const posterior = sd.encode_first_stage(fromRGBA({ width, height, ...picture }), height, width);
    const z = posterior.mean.map((v) => sd.config.scale_factor * v);
    say("autoencoded", { id, z, shape, picture: decode([z], shape)[0] });
  }

  // --- messages ------------------------------------------------------------------------------------------------------

  const ANSWERS = {
    load,
    draw: (message) => (drawings = drawings.then(() => answered(draw, message))),
    cancel: ({ id }) => cancelled.add(id),
    tokenize: ({ id, prompt }) => say("tokens", { id, ...sd.cond_stage_model.tokenize(prompt) }),
    decode: ({ id, latents, shape }) => say("decoded", { id, pictures: decode(latents, shape) }),
    autoencode,
  };

  async function answered(answer, message) {
    try {
      if (!answer) throw new Error(`The engine knows no message "${message.type}": see worker.js.`);
      if (!sd && answer !== load) throw new Error("There is no model yet: send `load` first.");
      await answer(message);
    } catch (error) {
      say("error", { id: message.id, message: error.message });
    }
  }

  globalThis.onmessage = ({ data }) => answered(ANSWERS[data.type], data);
});
