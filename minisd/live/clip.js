// Stage 5: CLIP's text tower, which turns a sentence into the context that the UNet reads. Beside minisd/clip.py.
//
//     "a red fox" ─► ids [n] ─► CLIPTextTransformer ─► last hidden state [d b 1 n]
minisdLive.push(function clip({ memory, Tensor, tidy, linear, layerNorm, silu, attention }) {
  // Self-attention, with a bias at each of the four projections, added to the residual.
  function CLIPAttention(w, x, heads, residual) {
    const [q, k, v] = ["q_proj", "k_proj", "v_proj"].map((name) => linear(w[name], x));
    return linear(w.out_proj, attention(q, k, v, heads, { causal: true }), residual);
  }

  // Widen by four, activate, and narrow again. The activation is OpenAI's "quick GELU", x · sigmoid(1.702 x), with
  // which the weights were trained.
  const CLIPMLP = (w, x, residual) => linear(w.fc2, silu(linear(w.fc1, x), 1.702), residual);

  function CLIPEncoderLayer(w, x, heads) {
    // Pre-norm: only the branch is normalised, and x itself runs through all layers and is only added to.
    const y = tidy(() => CLIPAttention(w.self_attn, layerNorm(w.layer_norm1, x), heads, x));
    return tidy(() => CLIPMLP(w.mlp, layerNorm(w.layer_norm2, y), y));
  }

  // A vector for each token plus a vector for each place in the sentence: b sentences of n ids -> [d b 1 n].
  function CLIPTextEmbeddings(w, sentences) {
    const [d, n] = [w.token_embedding.weight.shape[1], sentences[0].ids.length];
    const table = ({ address, shape }) => memory.floats(address, shape[0] * d); // a row of d numbers for each
    const [tokens, places] = [table(w.token_embedding.weight), table(w.position_embedding.weight)];
    const at = (ids, c, i) => tokens[ids[i] * d + c] + places[i * d + c];
    const vectors = ({ ids }) => new Float32Array(d * n).map((_, k) => at(ids, Math.floor(k / n), k % n));
    return Tensor.from(sentences.map(vectors), d, 1, n);
  }

  // Ids of tokens -> last hidden state, after the final norm: what Stable Diffusion calls the context.
  function CLIPTextTransformer(w, sentences, heads) {
    let x = CLIPTextEmbeddings(w.embeddings, sentences);
    for (let i = 0; i in w.encoder.layers; i++) x = CLIPEncoderLayer(w.encoder.layers[i], x, heads);
    return layerNorm(w.final_layer_norm, x);
  }

  // Prompts -> context, by a tokenizer and the text tower: Stable Diffusion's `cond_stage_model`.
  class FrozenCLIPEmbedder {
    constructor(config, weights, tokenizer) {
      const defaults = { max_length: 77, heads: 12 }; // of CLIPTextConfig
      Object.assign(this, { config: { ...defaults, ...config }, weights, tokenizer });
    }

    tokenize = (prompt) => this.tokenizer.encode(prompt, this.config.max_length);

    encode(prompts) {
      return CLIPTextTransformer(this.weights, prompts.map(this.tokenize), this.config.heads);
    }
  }

  return { FrozenCLIPEmbedder };
});
