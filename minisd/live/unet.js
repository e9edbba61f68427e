// Stage 3: the UNet, the network that predicts the noise in a noisy latent. Beside minisd/unet.py, in the same order.
//
//     eps = unet.forward(x, timestep, context)        x [4 b h w], context [d b 1 n] -> eps [4 b h w]
minisdLive.push(function unet({ Tensor, tidy, linear, conv2d, groupNorm, silu, concat, enlarge, SpatialTransformer }) {
  // A timestep as a vector that a linear layer can read: cosines, then sines, of many frequencies, [dim b 1 1].
  function timestep_embedding(t, b, dim, max_period = 10000) {
    const half = Math.floor(dim / 2);
    const waves = new Float32Array(dim);
    for (let i = 0; i < half; i++) {
      // ω_i = 10000^(-i / half), rounded to float32 wherever torch does. At t = 999 the fast waves turn 159 times, so
      // an angle that was computed more exactly would be another one.
      const exponent = Math.fround(Math.fround(Math.fround(-Math.log(max_period)) * i) / half);
      const angle = Math.fround(t * Math.fround(Math.exp(exponent)));
      [waves[i], waves[half + i]] = [Math.cos(angle), Math.sin(angle)];
    }
    return Tensor.from(Array(b).fill(waves), dim, 1, 1);
  }

  // Mix each pixel with its neighbours, at a known timestep, and add the result to the input.
  function ResBlock(w, x, { emb }) {
    // Normalise, activate, convolve: [c b h w] -> [c_out b h w].
    let h = conv2d(w.in_layers[2], groupNorm(w.in_layers[0], x, 1e-5, true));
    // [e b 1 1] -> [c_out b 1 1]: one number for each channel is added to all pixels alike. It says how noisy the input
    // is. (`emb` is SiLU(emb) already: every block begins with it, so it is computed once.)
    const shift = linear(w.emb_layers[1], emb).data;
    const [data, size] = [h.data, h.h * h.w];
    for (let k = 0; k < data.length; k++) data[k] += shift[Math.floor(k / size)];
    // A second round at the new width; then the correction is added to the input, brought to that width if it differs.
    h = groupNorm(w.out_layers[0], h, 1e-5, true);
    const skip = "skip_connection" in w ? linear(w.skip_connection, x) : x;
    return conv2d(w.out_layers[3], h, { residual: skip });
  }

  // Halve height and width. It pads one pixel on each side; the VAE's Downsample pads on the right and below only.
  const Downsample = (w, x) => conv2d(w.op, x, { stride: 2 });

  // Double height and width, to the size of the next skip connection, which may be odd.
  const Upsample = (w, x, { skip }) => conv2d(w.conv, enlarge(x, skip.h, skip.w));

  // unet.py builds the blocks from the config. Here the weights say which layers there are, by the names in each.
  function layerOf(w) {
    if ("in_layers" in w) return ResBlock;
    if ("transformer_blocks" in w) return SpatialTransformer;
    if ("op" in w) return Downsample;
    return "conv" in w ? Upsample : conv2d;
  }

  class UNetModel {
    constructor(config, weights) {
      const defaults = { in_channels: 4, model_channels: 320, num_heads: 8, num_head_channels: null }; // of UNetConfig
      Object.assign(this, { config: { ...defaults, ...config }, weights });
    }

    // One block: a few layers in a row, each of which takes what it needs beside the feature map.
    TimestepEmbedSequential(w, name, x, inputs) {
      const { num_heads, num_head_channels } = this.config;
      for (let i = 0; i in w; i++) {
        const heads = num_head_channels === null ? num_heads : x.c / num_head_channels;
        x = tidy(() => layerOf(w[i])(w[i], x, { ...inputs, heads, name: `${name}.${i}` }));
      }
      return x;
    }

    // Predict the noise: x [c b h w], all at the timestep t -> [c_out b h w].
    //
    // watch: see SpatialTransformer. record: (name, map), called with what each block returns.
    forward(x, t, context, watch, record) {
      const w = this.weights;
      // The timestep, as a vector that all ResBlocks read: [320 …] -> [1280 …] in SD v1.
      const embedding = timestep_embedding(t, x.b, this.config.model_channels);
      let emb = linear(w.time_embed[2], silu(linear(w.time_embed[0], embedding)));
      record("time_embed", emb);
      emb = silu(emb);

      let h = x;
      const run = (block, name, skip) => {
        h = this.TimestepEmbedSequential(block, name, h, { emb, context, skip, watch });
        record(name, h);
      };

      // The way down. The output of every block is kept for the way up.
      const skips = [];
      for (let i = 0; i in w.input_blocks; i++) {
        run(w.input_blocks[i], `input_blocks.${i}`);
        skips.push(h);
      }

      // The bottom: here each pixel gathers from the whole picture and from the prompt.
      run(w.middle_block, "middle_block");

      // The way up. The skips are taken from the end, because the last map of the way down has the size of the first
      // of the way up. An Upsample aims at the size of the next skip: a side of 5 was halved to 3, and twice 3 is 6.
      for (let i = 0; i in w.output_blocks; i++) {
        h = concat(h, skips.pop());
        run(w.output_blocks[i], `output_blocks.${i}`, skips.at(-1));
      }

      return conv2d(w.out[2], groupNorm(w.out[0], h, 1e-5, true));
    }
  }

  return { timestep_embedding, UNetModel };
});
