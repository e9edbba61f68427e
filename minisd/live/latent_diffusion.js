// Stage 7: the three networks as one model. Beside minisd/latent_diffusion.py.
//
//     prompt ─ get_learned_conditioning ─► context ─► sample: x_T … x_0 ─ decode_first_stage ─► picture
//     img2img:  picture ─ encode_first_stage ─► z ─ q_sample ─► z_t, and from there as in drawing
//
// Latents are plain arrays [c h w] in torch's order. Only the networks compute with tensors in the engine's memory.
(globalThis.minisdLive ??= []).push(function latent_diffusion(live) {
  const { memory, Tensor, readWeights, BPETokenizer, FrozenCLIPEmbedder, UNetModel, AutoencoderKL } = live;
  const { Generator, randn, NoiseSchedule, make_timesteps, remaining_timesteps, sample, SAMPLERS } = live;

  class LatentDiffusion {
    // config: the object of config.json. tokenizer: see BPETokenizer. buffers: the .safetensors files.
    constructor(config, tokenizer, buffers) {
      const parts = { unet: "UNetConfig", first_stage: "AutoencoderConfig", cond_stage: "CLIPTextConfig" };
      for (const [part, kind] of Object.entries(parts))
        if ((config[part]?.kind ?? (config[part] ? kind : "none")) !== kind)
          throw new Error(`This page draws with models whose ${part} is a ${kind}, and this one's is a ${config[part]?.kind}.`);
      memory.top = 64; // another model takes the place of the one before
      const weights = readWeights(buffers);
      this.config = { image_size: 512, scale_factor: 0.18215, parameterization: "eps", ...config };
      this.schedule = NoiseSchedule.from(config);
      this.unet = new UNetModel(config.unet, weights.model.diffusion_model);
      this.first_stage_model = new AutoencoderKL(config.first_stage, weights.first_stage_model);
      const text_model = weights.cond_stage_model.transformer.text_model;
      this.cond_stage_model = new FrozenCLIPEmbedder(config.cond_stage, text_model, new BPETokenizer(tokenizer));
      if (this.unet.config.in_channels !== this.first_stage_model.config.embed_dim)
        throw new Error("This model was trained for inpainting, which the page can't do: give it one that draws from a prompt.");
    }

    latent_shape(height = this.config.image_size, width = this.config.image_size) {
      const f = this.first_stage_model.downsampling;
      if (height % f || width % f) throw new Error(`A picture's sides must be multiples of ${f}, not ${height}×${width}.`);
      return [this.first_stage_model.config.embed_dim, height / f, width / f];
    }

    // --- the stages, under their names in CompVis -------------------------------------------------------------------

    get_learned_conditioning(prompts) {
      return this.cond_stage_model.encode(prompts);
    }

    // A picture [3 H W] in [-1, 1] -> mean and log variance of its latent, each [c h w].
    encode_first_stage(pixels, height, width) {
      return this.within(() => {
        const moments = this.first_stage_model.encode(Tensor.from([pixels], 3, height, width)).picture(0);
        const half = moments.length / 2;
        return { mean: moments.slice(0, half), logvar: moments.slice(half).map((v) => Math.min(Math.max(v, -30), 20)) };
      });
    }

    // z = scale_factor · sample, with sample = mean + σ ε and σ = exp(½ log σ²).
    get_first_stage_encoding({ mean, logvar }, generator) {
      const noise = randn(mean.length, generator);
      return mean.map((m, i) => this.config.scale_factor * Math.fround(m + Math.exp(0.5 * logvar[i]) * noise[i]));
    }

    // Scaled latents -> pictures [3 H W] in about [-1, 1], of one size.
    decode_first_stage(latents, [c, h, w]) {
      return this.within(() => {
        const unscaled = latents.map((z) => z.map((v) => v / this.config.scale_factor));
        const pictures = this.first_stage_model.decode(Tensor.from(unscaled, c, h, w));
        return latents.map((_, b) => pictures.picture(b));
      });
    }

    // The UNet's prediction for x [c h w] at the timestep t, once for each sentence of the context [d b 1 n].
    //
    // attention: collect how much each pixel reads each token: {layer: {h, w, weights [n h w]}}, the mean over the heads,
    //     for the last sentence. activations: also collect what each block returns, {block: {c, h, w, values}}.
    // hide: places of tokens of the last sentence that no pixel may read.
    apply_model(x, [c, h, w], t, context, { attention = false, activations = false, hide = [] } = {}) {
      return this.within(() => {
        const collected = { attention: {}, activations: {} };
        const last = context.b - 1;
        const watch = (name, heads, map) => {
          const record = (b, weights, m, n) => {
            if (b !== last) return;
            collected.attention[name] ??= { h: map.h, w: map.w, weights: new Float32Array(m * n) };
            const mean = collected.attention[name].weights;
            for (let k = 0; k < m * n; k++) mean[k] += weights[k] / heads;
          };
          const hidden = (b, token) => b === last && hide.includes(token);
          return { record: attention && record, hidden: hide.length && hidden };
        };
        const record = (name, map) => {
          collected.activations[name] = { c: map.c, h: map.h, w: map.w, values: map.picture(last) };
        };
        const input = Tensor.from(Array(context.b).fill(x), c, h, w);
        const out = this.unet.forward(input, t, context, { watch, ...(activations && { record }) });
        return { predictions: Array.from({ length: context.b }, (_, b) => out.picture(b)), ...collected };
      });
    }

    // Run a network, and free its memory.
    within(compute) {
      const start = memory.top;
      try {
        return compute();
      } finally {
        memory.top = start;
      }
    }

    // --- drawing ----------------------------------------------------------------------------------------------------

    // The steps from noise to latent, one at a time: what txt2img does, or img2img if there is an `init` picture,
    // {pixels [3 H W] in [-1, 1], height, width, strength}. `options` are those of apply_model.
    *draw({ prompt, negative = "", steps = 50, guidance = 7.5, sampler = "ddim", seed = 0, init = null, ...options }) {
      if (!(sampler in SAMPLERS)) throw new Error(`There is no sampler "${sampler}": choose ${Object.keys(SAMPLERS).join(", ")}.`);
      if (!(Number.isInteger(steps) && steps >= 1 && steps <= this.schedule.timesteps))
        throw new Error(`The number of steps must lie between 1 and ${this.schedule.timesteps}, and it is ${steps}.`);
      const generator = new Generator(seed);
      const shape = this.latent_shape(init?.height, init?.width);
      const size = shape.reduce((a, b) => a * b);
      let timesteps = make_timesteps(steps, this.schedule.timesteps, SAMPLERS[sampler].spacing);
      let x_T;
      if (init) {
        // The latent of the picture gets the noise of the first timestep that is left. Noise hides the details first and
        // the layout last, so the steps keep the layout and draw new details (SDEdit).
        timesteps = remaining_timesteps(timesteps, init.strength);
        const z = this.get_first_stage_encoding(this.encode_first_stage(init.pixels, init.height, init.width), generator);
        x_T = this.schedule.q_sample(z, timesteps[0], randn(size, generator));
      } else x_T = randn(size, generator);

      const start = memory.top;
      try {
        // Guidance needs ε for both prompts. One call with a batch of two is faster than two calls. The order is
        // [unconditional, conditional], as in CompVis.
        const context = this.get_learned_conditioning(guidance === 1 ? [prompt] : [negative, prompt]);
        const eps_model = (x, t) => {
          const { predictions, ...collected } = this.apply_model(x, shape, t, context, options);
          const to_eps = (prediction) => this.schedule.predict_noise(this.config.parameterization, x, t, prediction);
          const [eps_uncond, eps_cond] = [to_eps(predictions[0]), to_eps(predictions.at(-1))];
          if (guidance === 1) return { eps: eps_cond, ...collected };
          // ε = ε(x_t) + s (ε(x_t, c) - ε(x_t))                     (Ho & Salimans 2022, arXiv:2207.12598, eq. 6)
          return { eps: eps_uncond.map((e, k) => e + guidance * (eps_cond[k] - e)), eps_cond, eps_uncond, ...collected };
        };
        const tokens = this.cond_stage_model.tokenizer.encode(prompt, this.cond_stage_model.config.max_length);
        yield { shape, timesteps, tokens, context: context.picture(context.b - 1), x_T };
        yield* sample(sampler, eps_model, x_T, this.schedule, timesteps);
      } finally {
        memory.top = start; // also when nobody asks for the rest of the steps
      }
    }
  }

  Object.assign(live, { LatentDiffusion });
});
