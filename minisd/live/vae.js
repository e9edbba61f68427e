// Stage 4: the first stage, an autoencoder that turns a picture into a small latent and back. Beside minisd/vae.py.
//
//     picture [3 b H W] ─► Encoder, quant_conv ─► mean, logvar ─► z [4 b h w] ─► post_quant_conv, Decoder ─► picture
minisdLive.push(function vae({ tidy, linear, conv2d, groupNorm, enlarge, attention }) {
  const EPS = 1e-6; // of every norm here. (The UNet's ResBlocks have 1e-5.)

  // Two convolutions whose result is added to the input: the UNet's ResBlock without the time embedding.
  function ResnetBlock(w, x) {
    let h = conv2d(w.conv1, groupNorm(w.norm1, x, EPS, true)); // [c b h w] -> [c_out b h w]
    h = groupNorm(w.norm2, h, EPS, true);
    const shortcut = "nin_shortcut" in w ? linear(w.nin_shortcut, x) : x;
    return conv2d(w.conv2, h, { residual: shortcut });
  }

  // Self-attention over the pixels, with one head.
  function AttnBlock(w, x) {
    const h = groupNorm(w.norm, x, EPS);
    const [q, k, v] = ["q", "k", "v"].map((name) => linear(w[name], h));
    return linear(w.proj_out, attention(q, k, v, 1), x);
  }

  // Zeros on the right and below only, because CompVis ported this from TensorFlow, which pads like this at stride 2.
  const Downsample = (w, x) => conv2d(w.conv, x, { stride: 2, before: 0, after: 1 });
  const Upsample = (w, x) => conv2d(w.conv, enlarge(x, 2 * x.h, 2 * x.w));

  // The layers at one resolution: each ResnetBlock, followed by its AttnBlock if the level attends; then the step to
  // the next resolution, if there is one.
  function Level(w, x) {
    for (let i = 0; i in w.block; i++) {
      x = tidy(() => ResnetBlock(w.block[i], x));
      if ("attn" in w) x = tidy(() => AttnBlock(w.attn[i], x));
    }
    if ("downsample" in w) return tidy(() => Downsample(w.downsample, x));
    return "upsample" in w ? tidy(() => Upsample(w.upsample, x)) : x;
  }

  function Middle(w, x) {
    x = tidy(() => ResnetBlock(w.block_1, x));
    x = tidy(() => AttnBlock(w.attn_1, x));
    return tidy(() => ResnetBlock(w.block_2, x));
  }

  const last = (w, x) => conv2d(w.conv_out, groupNorm(w.norm_out, x, EPS, true));

  class AutoencoderKL {
    constructor(config, weights) {
      Object.assign(this, { config: { embed_dim: 4, ...config }, weights });
      this.levels = Object.keys(weights.decoder.up).length; // all but one halve the sides
      this.downsampling = 2 ** (this.levels - 1); // f: a latent pixel stands for f×f pixels of the picture
    }

    // Picture in [-1, 1] -> the moments of the distribution of its latent: the mean, then the log variance.
    encode(x) {
      const w = this.weights.encoder;
      let h = conv2d(w.conv_in, x); // [3 b H W] -> [ch b H W]
      // Each level looks at a larger part of the picture with each of its pixels.
      for (let level = 0; level < this.levels; level++) h = Level(w.down[level], h);
      h = Middle(w.mid, h);
      return linear(this.weights.quant_conv, last(w, h)); // [2·4 b h w]
    }

    // Latent -> picture, about in [-1, 1].
    decode(z) {
      const w = this.weights.decoder;
      // The layout of the whole picture is settled first, at the lowest resolution, where attention sees all of it.
      let h = conv2d(w.conv_in, linear(this.weights.post_quant_conv, z));
      h = Middle(w.mid, h);
      // Then each level adds finer detail. They are numbered from the full resolution, so up.0 runs last.
      for (let level = this.levels - 1; level >= 0; level--) h = Level(w.up[level], h);
      return last(w, h); // [3 b H W]
    }
  }

  return { AutoencoderKL };
});
