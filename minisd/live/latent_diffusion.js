// Stage 7: the three networks as one model. Beside minisd/latent_diffusion.py.
//
//     prompt ─ get_learned_conditioning ─► context ─► sample: x_T … x_0 ─ decode_first_stage ─► picture
//     img2img:  picture ─ encode_first_stage ─► z ─ q_sample ─► z_t, and from there as in drawing
//
// Latents and contexts are plain arrays, in torch's order [c h w] and as [d n]. Only the networks compute with tensors
// in the engine's memory.
minisdLive.push(function latent_diffusion(live) {
  const { memory, Tensor, readWeights, BPETokenizer, FrozenCLIPEmbedder, UNetModel, AutoencoderKL, Generator } = live;
  const { randn, NoiseSchedule, make_timesteps, remaining_timesteps, sample, SAMPLERS } = live;

  class LatentDiffusion {
    // config: the object of config.json. tokenizer: see BPETokenizer. buffers: the .safetensors files.
    constructor(config, tokenizer, buffers) {
      const kinds = { unet: "UNetConfig", first_stage: "AutoencoderConfig", cond_stage: "CLIPTextConfig" };
      for (const [part, kind] of Object.entries(kinds))
        if (!config[part] || (config[part].kind ?? kind) !== kind)
          throw new Error(`The page needs a model whose ${part} is a ${kind}, and this one's is not.`);
      memory.top = 64; // another model takes the place of the one before
      const { model, first_stage_model, cond_stage_model } = readWeights(buffers);
      const { text_model } = cond_stage_model.transformer;
      this.weights_end = memory.top; // what lies above is free before each call of a network
      this.config = { image_size: 512, scale_factor: 0.18215, parameterization: "eps", ...config };
      this.schedule = NoiseSchedule.from(config);
      this.unet = new UNetModel(config.unet, model.diffusion_model);
      this.first_stage_model = new AutoencoderKL(config.first_stage, first_stage_model);
      this.cond_stage_model = new FrozenCLIPEmbedder(config.cond_stage, text_model, new BPETokenizer(tokenizer));
      if (this.unet.config.in_channels !== this.first_stage_model.config.embed_dim)
        throw new Error("This model was trained for inpainting. The page needs one that draws from a prompt alone.");
    }

    latent_shape(height = this.config.image_size, width = this.config.image_size) {
      const f = this.first_stage_model.downsampling;
      if (height % f || width % f) throw new Error(`A picture's sides must be multiples of ${f}: ${height}×${width}.`);
      return [this.first_stage_model.config.embed_dim, height / f, width / f];
    }

    // --- the stages, under their names in CompVis -------------------------------------------------------------------

    // Prompts -> contexts, one array [d n] for each.
    get_learned_conditioning(prompts) {
      memory.top = this.weights_end;
      const context = this.cond_stage_model.encode(prompts);
      return prompts.map((_, b) => context.picture(b));
    }

    // A picture [3 H W] in [-1, 1] -> mean and log variance of its latent, each [c h w].
    encode_first_stage(pixels, height, width) {
      memory.top = this.weights_end;
      const moments = this.first_stage_model.encode(Tensor.from([pixels], 3, height, width)).picture(0);
      const half = moments.length / 2;
      return { mean: moments.slice(0, half), logvar: moments.slice(half).map((v) => Math.min(Math.max(v, -30), 20)) };
    }

    // z = scale_factor · sample, with sample = mean + σ ε and σ = exp(½ log σ²).
    get_first_stage_encoding({ mean, logvar }, generator) {
      const noise = randn(mean.length, generator);
      return mean.map((m, i) => this.config.scale_factor * (m + Math.exp(0.5 * logvar[i]) * noise[i]));
    }

    // Scaled latents -> pictures [3 H W] in about [-1, 1], of one size.
    decode_first_stage(latents, [c, h, w]) {
      memory.top = this.weights_end;
      const unscaled = latents.map((z) => z.map((v) => v / this.config.scale_factor));
      const pictures = this.first_stage_model.decode(Tensor.from(unscaled, c, h, w));
      return latents.map((_, b) => pictures.picture(b));
    }

    // The UNet's predictions for x [c h w] at the timestep t, one for each of the contexts.
    //
    // attention: collect how much each pixel reads each token of the last context, as {layer: {h, w, weights [n h w]}},
    //     the mean over the heads. activations: collect what each block returns, as {block: {c, h, w, values}}.
    // hide: places of tokens of the last context that no pixel may read.
    apply_model(x, [c, h, w], t, contexts, { attention = false, activations = false, hide = [] } = {}) {
      const collected = { attention: {}, activations: {} };
      const last = contexts.length - 1;
      const hidden = hide.length && ((b, token) => b === last && hide.includes(token));
      const watch = (name, heads, map) => {
        const record = (b, weights, m, n) => {
          const mean = (collected.attention[name] ??= { h: map.h, w: map.w, weights: new Float32Array(m * n) }).weights;
          if (b === last) weights.forEach((weight, k) => (mean[k] += weight / heads));
        };
        return { record: attention && record, hidden };
      };
      const record = (name, map) => {
        if (activations) collected.activations[name] = { c: map.c, h: map.h, w: map.w, values: map.picture(last) };
      };
      memory.top = this.weights_end;
      const n = this.cond_stage_model.config.max_length;
      const context = Tensor.from(contexts, contexts[0].length / n, 1, n);
      const batch = Tensor.from(contexts.map(() => x), c, h, w);
      const out = this.unet.forward(batch, t, context, watch, record);
      return { predictions: contexts.map((_, b) => out.picture(b)), ...collected };
    }

    // --- drawing ----------------------------------------------------------------------------------------------------

    // The steps from noise to latent, one at a time: what txt2img does, or img2img if there is an `init` picture,
    // {pixels [3 H W] in [-1, 1], height, width, strength}. `options` are those of apply_model.
    *draw({ prompt, negative = "", steps = 50, guidance = 7.5, sampler = "ddim", seed = 0, init = null, ...options }) {
      const T = this.schedule.timesteps;
      if (!(sampler in SAMPLERS)) throw new Error(`There is no sampler "${sampler}", only ${Object.keys(SAMPLERS)}.`);
      if (!(steps >= 1 && steps <= T) || steps % 1) throw new Error(`There can be 1 to ${T} steps, not ${steps}.`);
      const generator = new Generator(seed);
      const shape = this.latent_shape(init?.height, init?.width);
      const noise = () => randn(shape[0] * shape[1] * shape[2], generator);
      const all = make_timesteps(steps, T, SAMPLERS[sampler].spacing);
      const timesteps = init ? remaining_timesteps(all, init.strength) : all;
      // The latent of a picture gets the noise of the first timestep that is left. Noise hides the details first and
      // the layout last, so the steps keep the layout and draw new details (SDEdit).
      const posterior = init && this.encode_first_stage(init.pixels, init.height, init.width);
      const z = init && this.get_first_stage_encoding(posterior, generator);
      const x_T = init ? this.schedule.q_sample(z, timesteps[0], noise()) : noise();

      // Guidance needs ε for both prompts. One call with a batch of two is faster than two calls. The order is
      // [unconditional, conditional], as in CompVis.
      const contexts = this.get_learned_conditioning(guidance === 1 ? [prompt] : [negative, prompt]);
      const eps_model = (x, t) => {
        const { predictions, ...collected } = this.apply_model(x, shape, t, contexts, options);
        const to_eps = (prediction) => this.schedule.predict_noise(this.config.parameterization, x, t, prediction);
        if (guidance === 1) return { eps: to_eps(predictions[0]), ...collected };
        const [eps_uncond, eps_cond] = predictions.map(to_eps);
        // ε = ε(x_t) + s (ε(x_t, c) - ε(x_t))                         (Ho & Salimans 2022, arXiv:2207.12598, eq. 6)
        return { eps: eps_uncond.map((e, k) => e + guidance * (eps_cond[k] - e)), eps_cond, eps_uncond, ...collected };
      };
      yield { shape, timesteps, tokens: this.cond_stage_model.tokenize(prompt), context: contexts.at(-1), x_T };
      yield* sample(sampler, eps_model, x_T, this.schedule, timesteps);
    }
  }

  return { LatentDiffusion };
});
