// Stage 3: the UNet, the network that predicts the noise in a noisy latent. Beside minisd/unet.py, in the same order.
//
//     eps = unet.forward(x, timestep, context)        x [4 b h w], context [d b 1 n] -> eps [4 b h w]
(globalThis.minisdLive ??= []).push(function unet(live) {
  const { Tensor, tidy, linear, conv2d, groupNorm, silu, concat, enlarge, SpatialTransformer } = live;

  // A timestep as a vector that a linear layer can read: cosines, then sines, of many frequencies, [dim b 1 1].
  function timestep_embedding(t, b, dim, max_period = 10000) {
    const half = Math.floor(dim / 2);
    const out = new Tensor(dim, b, 1, 1);
    const data = out.data.fill(0);
    for (let i = 0; i < half; i++) {
      // ω_i = 10000^(-i / half), rounded to float32 wherever torch does. At t = 999 the fast waves turn 159 times, so an
      // angle that was computed more exactly would be another one.
      const exponent = Math.fround(Math.fround(Math.fround(-Math.log(max_period)) * i) / half);
      const angle = Math.fround(t * Math.fround(Math.exp(exponent)));
      data.fill(Math.cos(angle), i * b, (i + 1) * b);
      data.fill(Math.sin(angle), (half + i) * b, (half + i + 1) * b);
    }
    return out;
  }

  // Mix each pixel with its neighbours, at a known timestep, and add the result to the input.
  function ResBlock(w, x, emb) {
    // Normalise, activate, convolve: [c b h w] -> [c_out b h w].
    let h = conv2d(w.in_layers[2], groupNorm(w.in_layers[0], x, 1e-5, true));
    // [e b 1 1] -> [c_out b 1 1]: one number for each channel is added to all pixels alike. It says how noisy the input
    // is. (`emb` is SiLU(emb) already: every block begins with it, so it is computed once.)
    const shift = linear(w.emb_layers[1], emb).data;
    const [data, size] = [h.data, h.h * h.w];
    for (let k = 0; k < data.length; k++) data[k] += shift[Math.floor(k / size)];
    // A second round at the new width; then the correction is added to the input, brought to that width where it differs.
    h = groupNorm(w.out_layers[0], h, 1e-5, true);
    const skip = "skip_connection" in w ? linear(w.skip_connection, x) : x;
    return conv2d(w.out_layers[3], h, { residual: skip });
  }

  // Halve height and width. It pads one pixel on each side; the VAE's Downsample pads on the right and below only.
  const Downsample = (w, x) => conv2d(w.op, x, { stride: 2 });

  // Double height and width, to the size of the next skip connection, which may be odd.
  const Upsample = (w, x, skip) => conv2d(w.conv, enlarge(x, skip.h, skip.w));

  class UNetModel {
    constructor(config, weights) {
      const defaults = {
        in_channels: 4, model_channels: 320, num_res_blocks: 2, channel_mult: [1, 2, 4, 4],
        attention_resolutions: [4, 2, 1], num_heads: 8, num_head_channels: null, transformer_depth: 1,
      }; // those of UNetConfig
      this.config = { ...defaults, ...config };
      this.weights = weights;

      // What stands in each block, in the order of unet.py.
      const { channel_mult, num_res_blocks, attention_resolutions } = this.config;
      const bottom = channel_mult.length - 1;
      const layers = (level) => [ResBlock, ...(attention_resolutions.includes(2 ** level) ? [SpatialTransformer] : [])];
      this.input_blocks = [[conv2d]];
      this.middle_block = [ResBlock, SpatialTransformer, ResBlock];
      this.output_blocks = [];
      for (let level = 0; level <= bottom; level++) {
        for (let i = 0; i < num_res_blocks; i++) this.input_blocks.push(layers(level));
        if (level < bottom) this.input_blocks.push([Downsample]);
      }
      for (let level = bottom; level >= 0; level--)
        for (let i = 0; i <= num_res_blocks; i++)
          this.output_blocks.push([...layers(level), ...(level > 0 && i === num_res_blocks ? [Upsample] : [])]);
    }

    // One block: a few layers in a row, each given the inputs that it takes beside the feature map.
    TimestepEmbedSequential(w, name, layers, x, { emb, context, size, watch }) {
      const { num_heads, num_head_channels, transformer_depth } = this.config;
      layers.forEach((layer, i) => {
        const h = x;
        const heads = num_head_channels === null ? num_heads : h.c / num_head_channels;
        const inputs = new Map([
          [ResBlock, [emb]],
          [SpatialTransformer, [context, heads, transformer_depth, watch, `${name}.${i}`]],
          [Upsample, [size]],
        ]);
        x = tidy(() => layer(w[i], h, ...(inputs.get(layer) ?? [])));
      });
      return x;
    }

    // Predict the noise: x [c b h w], all at the timestep t -> [c_out b h w].
    //
    // watch: see SpatialTransformer. record: (name, map), called with what each block returns.
    forward(x, t, context, { watch = null, record = () => {} } = {}) {
      const w = this.weights;
      return tidy(() => {
        // The timestep, as a vector that all ResBlocks read: [320 …] -> [1280 …] in SD v1.
        const embedding = timestep_embedding(t, x.b, this.config.model_channels);
        let emb = linear(w.time_embed[2], silu(linear(w.time_embed[0], embedding)));
        record("time_embed", emb);
        emb = silu(emb);

        let h = x;
        const run = (block, name, layers, size) => {
          h = this.TimestepEmbedSequential(block, name, layers, h, { emb, context, size, watch });
          record(name, h);
        };

        // The way down. The output of every block is kept for the way up.
        const skips = [];
        this.input_blocks.forEach((layers, i) => {
          run(w.input_blocks[i], `input_blocks.${i}`, layers);
          skips.push(h);
        });

        // The bottom: here each pixel gathers from the whole picture and from the prompt.
        run(w.middle_block, "middle_block", this.middle_block);

        // The way up. The skips are taken from the end, because the last map of the way down has the size of the first
        // of the way up. An Upsample aims at the size of the next skip: a side of 5 was halved to 3, and twice 3 is 6.
        this.output_blocks.forEach((layers, i) => {
          h = concat(h, skips.pop());
          run(w.output_blocks[i], `output_blocks.${i}`, layers, skips.at(-1));
        });

        return conv2d(w.out[2], groupNorm(w.out[0], h, 1e-5, true));
      });
    }
  }

  Object.assign(live, { timestep_embedding, UNetModel });
});
