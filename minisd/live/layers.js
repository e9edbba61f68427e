// The layers that all three networks are made of: what torch.nn and torch.nn.functional are to unet.py, clip.py, vae.py.
//
// A tensor has the shape [channels, batch, height, width], where torch has [batch, channels, …]. With the channels first,
// all pixels of all pictures of a batch are the columns of one matrix [c, b·h·w]. So a linear layer, a 1×1 convolution, a
// 3×3 convolution and both products of attention are the same matrix product, with the weights as they are stored. A
// sentence is a tensor [d, b, 1, n].
(globalThis.minisdLive ??= []).push(function layers(live) {
  const { memory, pack, gemm } = live;

  class Tensor {
    constructor(c, b, h, w, address = memory.allocate(c * b * h * w)) {
      Object.assign(this, { c, b, h, w, address });
    }

    get columns() {
      return this.b * this.h * this.w;
    }

    // A view of the numbers. It is made anew each time, because views become empty when the memory grows.
    get data() {
      return memory.floats(this.address, this.c * this.columns);
    }

    // One picture of the batch as an array of its own, in torch's order [c h w].
    picture(b) {
      const [size, data] = [this.h * this.w, this.data];
      const out = new Float32Array(this.c * size);
      for (let c = 0; c < this.c; c++) {
        const from = (c * this.b + b) * size;
        out.set(data.subarray(from, from + size), c * size);
      }
      return out;
    }

    // The inverse: arrays [c h w], one for each picture of the batch.
    static from(pictures, c, h, w) {
      const out = new Tensor(c, pictures.length, h, w);
      const [size, data] = [h * w, out.data];
      for (let i = 0; i < c * pictures.length; i++) {
        const [channel, b] = [Math.floor(i / pictures.length), i % pictures.length];
        data.set(pictures[b].subarray(channel * size, (channel + 1) * size), i * size);
      }
      return out;
    }
  }

  // Compute a tensor, and free all memory that was taken on the way. The result moves down to where that began.
  function tidy(compute) {
    const start = memory.top;
    const result = compute();
    const bytes = 4 * result.c * result.columns;
    new Uint8Array(memory.buffer).copyWithin(start, result.address, result.address + bytes);
    memory.top = start;
    result.address = memory.allocate(bytes / 4);
    return result;
  }

  // --- the matrix product -------------------------------------------------------------------------------------------

  // C [M N] = A [M K] · B [K N] + bias (+ C). A is the address of its first number and the distance of its rows in
  // numbers, and so is C. B's number (k, j) lies at b + 4 · (rows[k] + cols[j]): see gemm.wat.
  function product(M, N, K, [a, lda], b, rows, cols, [c, ldc], bias = 0, add = 0) {
    const start = memory.top;
    const panels = Math.ceil(N / 8);
    const table = memory.allocate(8 * panels + K);
    // As many panels at once as fit into the processor's second cache, beside the rows of A that they are multiplied by.
    const group = Math.min(panels, Math.max(1, Math.floor(8192 / K)));
    const packed = memory.allocate(group * K * 8);
    const tile = memory.allocate(8 * M);
    const offsets = memory.integers(table, 8 * panels + K);
    for (let j = 0; j < 8 * panels; j++) offsets[j] = 4 * cols[Math.min(j, N - 1)]; // the last panel is filled up
    for (let k = 0; k < K; k++) offsets[8 * panels + k] = 4 * rows[k];
    for (let p = 0; p < panels; p += group) {
      const count = Math.min(group, panels - p);
      pack(b, table + 32 * p, table + 32 * panels, K, count, packed);
      const whole = Math.min(count, Math.floor(N / 8) - p);
      if (whole) gemm(M, K, a, 4 * lda, packed, whole, c + 32 * p, 4 * ldc, bias, add);
      if (whole === count) continue;
      // Of the last panel, fewer than 8 columns belong to C. They are computed aside, and copied.
      gemm(M, K, a, 4 * lda, packed + 32 * K * whole, 1, tile, 32, bias, 0);
      const [from, to] = [memory.floats(tile, 8 * M), memory.floats(c, (M - 1) * ldc + N)];
      for (let m = 0; m < M; m++)
        for (let j = 8 * Math.floor(N / 8); j < N; j++) to[m * ldc + j] = from[8 * m + (j % 8)] + add * to[m * ldc + j];
    }
    memory.top = start;
  }

  // 0, step, 2 · step …: the offsets of the rows or columns of a plain matrix.
  function range(count, step = 1) {
    const out = new Int32Array(count);
    for (let i = 0; i < count; i++) out[i] = i * step;
    return out;
  }

  // A projection of attention has no bias, and the address 0 says so.
  const bias = (w) => ("bias" in w ? w.bias.address : 0);

  // W x + b, for each column of x: [c …] -> [c_out …]. With a residual [c_out …], the product is added to it.
  function linear(w, x, residual = null) {
    const { address, shape } = w.weight;
    const [out, K] = [new Tensor(shape[0], x.b, x.h, x.w), x.c];
    if (residual) out.data.set(residual.data);
    const [n, rows] = [x.columns, range(K, x.columns)];
    product(out.c, n, K, [address, K], x.address, rows, range(n), [out.address, n], bias(w), residual ? 1 : 0);
    return out;
  }

  // A convolution with a square kernel. `before` and `after`: how many zeros stand to the left and above, to the right
  // and below. It becomes a matrix product by "im2col": one column for each pixel of the output, holding the patch of
  // the input that the kernel sees there. `pack` gathers the patches, so the whole matrix is never in memory.
  function conv2d(w, x, { stride = 1, before = 1, after = 1, residual = null } = {}) {
    const { address, shape } = w.weight;
    const [c_out, , side] = shape; // [c_out c k k]
    if (side === 1) return linear(w, x, residual);
    const [high, wide] = [x.h + before + after, x.w + before + after];
    const h = Math.floor((high - side) / stride) + 1;
    const width = Math.floor((wide - side) / stride) + 1;
    const out = new Tensor(c_out, x.b, h, width);
    if (residual) out.data.set(residual.data);
    const start = memory.top;
    const padded = pad(x, before, high, wide);
    const [rows, cols] = [new Int32Array(x.c * side * side), new Int32Array(out.columns)];
    for (let k = 0, c = 0; c < x.c; c++)
      for (let i = 0; i < side; i++)
        for (let j = 0; j < side; j++) rows[k++] = (c * x.b * high + i) * wide + j;
    for (let k = 0, b = 0; b < x.b; b++)
      for (let i = 0; i < h; i++)
        for (let j = 0; j < width; j++) cols[k++] = (b * high + i * stride) * wide + j * stride;
    const [M, N, K] = [c_out, out.columns, rows.length];
    product(M, N, K, [address, K], padded.address, rows, cols, [out.address, N], bias(w), residual ? 1 : 0);
    memory.top = start;
    return out;
  }

  // x with a frame of zeros: [c b h w] -> [c b high wide].
  function pad(x, before, high, wide) {
    const out = new Tensor(x.c, x.b, high, wide);
    const [from, to] = [x.data, out.data];
    to.fill(0);
    for (let plane = 0, k = 0; plane < x.c * x.b; plane++)
      for (let i = 0; i < x.h; i++)
        for (let j = 0, at = (plane * high + i + before) * wide + before; j < x.w; j++) to[at++] = from[k++];
    return out;
  }

  // --- norms and activations ----------------------------------------------------------------------------------------

  // Mean 0 and variance 1 over each of 32 groups of channels, within one picture; then each channel's own scale γ and
  // shift β (Wu & He 2018, arXiv:1803.08494). With `activate`, SiLU follows: x · sigmoid(x), in the same pass.
  function groupNorm(w, x, eps, activate = false) {
    const out = new Tensor(x.c, x.b, x.h, x.w);
    const [from, to, size, channels] = [x.data, out.data, x.h * x.w, x.c / 32];
    const [gamma, beta] = [memory.floats(w.weight.address, x.c), memory.floats(w.bias.address, x.c)];
    for (let first = 0; first < x.c; first += channels)
      for (let b = 0; b < x.b; b++) {
        let sum = 0;
        let squares = 0;
        for (let c = first; c < first + channels; c++)
          for (let k = (c * x.b + b) * size, end = k + size; k < end; k++) sum += from[k];
        const mean = sum / (channels * size);
        for (let c = first; c < first + channels; c++)
          for (let k = (c * x.b + b) * size, end = k + size; k < end; k++)
            squares += (from[k] - mean) * (from[k] - mean);
        const scale = 1 / Math.sqrt(squares / (channels * size) + eps);
        for (let c = first; c < first + channels; c++) {
          const [slope, shift] = [scale * gamma[c], beta[c] - mean * scale * gamma[c]];
          for (let k = (c * x.b + b) * size, end = k + size; k < end; k++) {
            const y = from[k] * slope + shift;
            to[k] = activate ? y / (1 + Math.exp(-y)) : y;
          }
        }
      }
    return out;
  }

  // The same over the channels of each column, which is a token: LayerNorm, with torch's ε.
  function layerNorm(w, x) {
    const out = new Tensor(x.c, x.b, x.h, x.w);
    const [from, to, n] = [x.data, out.data, x.columns];
    const [gamma, beta] = [memory.floats(w.weight.address, x.c), memory.floats(w.bias.address, x.c)];
    // Row by row, for all columns at once, because the numbers of a row are neighbours in memory.
    const [mean, scale] = [new Float64Array(n), new Float64Array(n)];
    for (let k = 0, c = 0; c < x.c; c++) for (let j = 0; j < n; j++) mean[j] += from[k++] / x.c;
    for (let k = 0, c = 0; c < x.c; c++)
      for (let j = 0; j < n; j++, k++) scale[j] += (from[k] - mean[j]) * (from[k] - mean[j]);
    for (let j = 0; j < n; j++) scale[j] = 1 / Math.sqrt(scale[j] / x.c + 1e-5);
    for (let k = 0, c = 0; c < x.c; c++)
      for (let j = 0; j < n; j++, k++) to[k] = (from[k] - mean[j]) * scale[j] * gamma[c] + beta[c];
    return out;
  }

  // Replace each number of x by f of it.
  function apply(f, x) {
    const data = x.data;
    for (let k = 0; k < data.length; k++) data[k] = f(data[k]);
    return x;
  }

  const silu = (x) => apply((v) => v / (1 + Math.exp(-v)), x);

  // x Φ(x), where Φ is the normal distribution: the exact GELU. JavaScript has no error function. This is erfc by a
  // Chebyshev polynomial, with an error below 1.2e-7 of its value (Press et al., "Numerical Recipes in C", section 6.2).
  function gelu(x) {
    const z = Math.abs(x) * Math.SQRT1_2;
    const t = 1 / (1 + 0.5 * z);
    const tail = 0.5 * t * Math.exp(-z * z - 1.26551223 + t * (1.00002368 + t * (0.37409196 + t * (0.09678418 +
      t * (-0.18628806 + t * (0.27886807 + t * (-1.13520398 + t * (1.48851587 + t * (-0.82215223 + t * 0.17087277)))))))));
    return x * (x < 0 ? tail : 1 - tail);
  }

  // --- changes of shape ---------------------------------------------------------------------------------------------

  // The channels of a, then those of b. With the channels first, they are simply written one after the other.
  function concat(a, b) {
    const out = new Tensor(a.c + b.c, a.b, a.h, a.w);
    out.data.set(a.data);
    out.data.set(b.data, a.c * a.columns);
    return out;
  }

  // Each pixel becomes a block of equal ones: nearest neighbour, as torch's interpolate.
  function enlarge(x, h, w) {
    const out = new Tensor(x.c, x.b, h, w);
    const [from, to] = [x.data, out.data];
    for (let plane = 0, k = 0; plane < x.c * x.b; plane++)
      for (let i = 0; i < h; i++) {
        const row = (plane * x.h + Math.floor((i * x.h) / h)) * x.w;
        for (let j = 0; j < w; j++) to[k++] = from[row + Math.floor((j * x.w) / w)];
      }
    return out;
  }

  Object.assign(live, { Tensor, tidy, product, range, linear, conv2d, groupNorm, layerNorm, apply, silu, gelu });
  Object.assign(live, { concat, enlarge });
});
