// Stage 3, continued: attention, by which each pixel reads the other pixels and the prompt. Beside minisd/attention.py.
//
//     attention(Q, K, V) = softmax(Q Kᵀ / √d) V                   (Vaswani et al. 2017, arXiv:1706.03762, eq. 1)
minisdLive.push(function attention({ memory, Tensor, tidy, product, range, linear, groupNorm, layerNorm, gelu }) {
  // Each of n queries takes a weighted mean of m values. q is [heads·d, b, 1, n], k and v are [heads·d, b, 1, m].
  //
  // causal: token i reads tokens 0 … i only (CLIP's text tower).
  // record: a function that receives the weights of one picture and head, [m n]: row j says how much each pixel reads
  //     token j, so it is a picture of that token.
  // hidden: (picture, token) -> whether nobody may read that token, as if the word were not there.
  function attention(q, k, v, heads, { causal = false, record = null, hidden = null } = {}) {
    const out = new Tensor(q.c, q.b, q.h, q.w);
    const start = memory.top;
    const [d, n, m, scale] = [q.c / heads, q.h * q.w, k.h * k.w, (q.c / heads) ** -0.5];
    const [keys, weights] = [memory.allocate(m * d), memory.allocate(m * n)];
    for (let b = 0; b < q.b; b++)
      for (let head = 0; head < heads; head++) {
        // where this head's channels of this picture begin
        const from = head * d * q.columns + b * n;
        const fromKey = head * d * k.columns + b * m;
        // How well does each query match each key? Kᵀ [m d] · Q [d n] / √d -> scores [m n]. A dot product sums d terms,
        // so its standard deviation grows as √d, and without the division one score would take all of the weight.
        const [keyData, transposed] = [k.data, memory.floats(keys, m * d)];
        for (let c = 0; c < d; c++)
          for (let j = 0; j < m; j++) transposed[j * d + c] = keyData[fromKey + c * k.columns + j] * scale;
        product(m, n, d, [keys, d], q.address + 4 * from, range(d, q.columns), range(n), [weights, n]);
        softmax(memory.floats(weights, m * n), m, n, (i, j) => (causal && j > i) || (hidden && hidden(b, j)));
        if (record) record(b, memory.floats(weights, m * n), m, n);
        // The weighted mean of the values: V [d m] · weights [m n] -> [d n].
        const V = [v.address + 4 * fromKey, v.columns];
        product(d, n, m, V, weights, range(m, n), range(n), [out.address + 4 * from, q.columns]);
      }
    memory.top = start;
    return out;
  }

  // Each column of scores [m n] becomes positive weights that sum to 1. `blocked(i, j)`: query i may not read token j.
  function softmax(scores, m, n, blocked) {
    for (let i = 0; i < n; i++) {
      let [largest, sum] = [-Infinity, 0];
      for (let j = 0, k = i; j < m; j++, k += n) {
        if (blocked(i, j)) scores[k] = -Infinity; // exp(-∞) = 0: no weight
        // A softmax does not change when all scores are shifted alike. Without the largest, exp can't overflow.
        if (scores[k] > largest) largest = scores[k];
      }
      for (let j = 0, k = i; j < m; j++, k += n) sum += scores[k] = Math.exp(scores[k] - largest);
      for (let j = 0, k = i; j < m; j++, k += n) scores[k] /= sum;
    }
  }

  // Attention from the tokens x to the tokens of a context, or, without a context, to x itself. The result is added to
  // the residual:   W_O attention(W_Q x, W_K context, W_V context) + b_O                          (LDM, section 3.3)
  function CrossAttention(w, x, context, heads, residual, options) {
    const [q, k, v] = [linear(w.to_q, x), linear(w.to_k, context), linear(w.to_v, context)];
    return linear(w.to_out[0], attention(q, k, v, heads, options), residual);
  }

  // Two layers that process each token by itself. The first is a linear layer with a gate, GEGLU: value · GELU(gate).
  function FeedForward(w, x, residual) {
    const h = linear(w.net[0].proj, x); // [2·c_out …]: the values, then the gates
    const gated = new Tensor(h.c / 2, h.b, h.h, h.w);
    const [from, to] = [h.data, gated.data];
    for (let k = 0; k < to.length; k++) to[k] = from[k] * gelu(from[to.length + k]);
    return linear(w.net[2], gated, residual);
  }

  // Self-attention, cross-attention and a feed-forward network, each normalised before and added after.
  function BasicTransformerBlock(w, x, context, heads, options) {
    const h = layerNorm(w.norm1, x);
    x = tidy(() => CrossAttention(w.attn1, h, h, heads, x, {})); // pixels read pixels
    const words = layerNorm(w.norm2, x);
    x = tidy(() => CrossAttention(w.attn2, words, context, heads, x, options)); // pixels read words
    return tidy(() => FeedForward(w.ff, layerNorm(w.norm3, x), x)); // each pixel by itself
  }

  // Transformer blocks over the pixels of a feature map, [c b h w] -> [c b h w].
  //
  // watch: (name of the layer that reads the context, heads, map) -> options for its attention.
  function SpatialTransformer(w, x, { context, heads, watch, name }) {
    // The checkpoint was trained with eps 1e-6 here and with 1e-5 in the ResBlocks, which its weights do not show.
    let h = groupNorm(w.norm, x, 1e-6);
    // The pixels are the tokens. With the channels first they are columns already, so nothing has to be rearranged.
    h = linear(w.proj_in, h);
    for (let i = 0; i in w.transformer_blocks; i++) {
      const options = watch(`${name}.transformer_blocks.${i}.attn2`, heads, x);
      h = BasicTransformerBlock(w.transformer_blocks[i], h, context, heads, options);
    }
    return linear(w.proj_out, h, x); // added to the input
  }

  return { attention, SpatialTransformer };
});
