// Stage 5: CLIP's text tower, which turns a sentence into the context that the UNet reads. Beside minisd/clip.py.
//
//     "a red fox" ─► ids [n] ─► CLIPTextTransformer ─► last hidden state [d b 1 n]
(globalThis.minisdLive ??= []).push(function clip(live) {
  const { memory, Tensor, tidy, linear, layerNorm, apply, attention } = live;

  // Self-attention, with a bias at each of the four projections, added to the residual.
  function CLIPAttention(w, x, heads, residual) {
    const [q, k, v] = ["q_proj", "k_proj", "v_proj"].map((name) => linear(w[name], x));
    return linear(w.out_proj, attention(q, k, v, heads, { causal: true }), residual);
  }

  // Widen by four, activate, and narrow again. The activation is OpenAI's "quick GELU", x · sigmoid(1.702 x), with which
  // the weights were trained.
  function CLIPMLP(w, x, residual) {
    const h = linear(w.fc1, x);
    return linear(w.fc2, apply((v) => v / (1 + Math.exp(-1.702 * v)), h), residual);
  }

  function CLIPEncoderLayer(w, x, heads) {
    // Pre-norm: only the branch is normalised, and x itself runs through all layers and is only added to.
    const y = tidy(() => CLIPAttention(w.self_attn, layerNorm(w.layer_norm1, x), heads, x));
    return tidy(() => CLIPMLP(w.mlp, layerNorm(w.layer_norm2, y), y));
  }

  // A vector for each token plus a vector for each place in the sentence: ids [b][n] -> [d b 1 n].
  function CLIPTextEmbeddings(w, ids) {
    const [token, position] = [w.token_embedding.weight, w.position_embedding.weight];
    const [d, n] = [token.shape[1], ids[0].length];
    const out = new Tensor(d, ids.length, 1, n);
    const data = out.data;
    const tokens = memory.floats(token.address, token.shape[0] * d); // [vocabulary d]: the rows of the tables
    const places = memory.floats(position.address, position.shape[0] * d);
    for (let k = 0, c = 0; c < d; c++)
      for (const row of ids) for (let i = 0; i < n; i++) data[k++] = tokens[row[i] * d + c] + places[i * d + c];
    return out;
  }

  // Ids of tokens -> last hidden state, after the final norm: what Stable Diffusion calls the context.
  function CLIPTextTransformer(w, ids, { layers, heads }) {
    return tidy(() => {
      let x = CLIPTextEmbeddings(w.embeddings, ids);
      for (let i = 0; i < layers; i++) x = CLIPEncoderLayer(w.encoder.layers[i], x, heads);
      return layerNorm(w.final_layer_norm, x);
    });
  }

  // Prompts -> context, by a tokenizer and the text tower: Stable Diffusion's `cond_stage_model`.
  class FrozenCLIPEmbedder {
    constructor(config, weights, tokenizer) {
      this.config = { max_length: 77, layers: 12, heads: 12, ...config }; // the defaults of CLIPTextConfig
      Object.assign(this, { weights, tokenizer });
    }

    encode(prompts) {
      const ids = prompts.map((prompt) => this.tokenizer.encode(prompt, this.config.max_length).ids);
      return CLIPTextTransformer(this.weights, ids, this.config);
    }
  }

  Object.assign(live, { FrozenCLIPEmbedder });
});
