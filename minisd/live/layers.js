// The layers that all three networks are made of: what torch.nn is to unet.py, clip.py and vae.py.
//
// A tensor has the shape [channels, batch, height, width], where torch has [batch, channels, …]. With the channels
// first, all pixels of all pictures of a batch are the columns of one matrix [c, b·h·w]. So a linear layer, a 1×1 or
// 3×3 convolution, and both products of attention are the same matrix product, with the weights as they are stored. A
// sentence is a tensor [d b 1 n].
minisdLive.push(function layers({ memory, pack, gemm }) {
  const { ceil, floor, min, max, sqrt, exp, abs } = Math;

  class Tensor {
    constructor(c, b, h, w) {
      Object.assign(this, { c, b, h, w, columns: b * h * w, address: memory.allocate(c * b * h * w) });
    }

    // A view of the numbers. It is made anew each time, because views become empty when the memory grows.
    get data() {
      return memory.floats(this.address, this.c * this.columns);
    }

    // One picture of the batch as an array of its own, in torch's order [c h w].
    picture(b) {
      const [data, size] = [this.data, this.h * this.w];
      return new Float32Array(this.c * size).map((_, k) => data[(floor(k / size) * this.b + b) * size + (k % size)]);
    }

    // The inverse: from arrays [c h w], one for each picture of the batch.
    static from(pictures, c, h, w) {
      const [out, size] = [new Tensor(c, pictures.length, h, w), h * w];
      const data = out.data;
      for (let b = 0; b < out.b; b++)
        for (let k = 0; k < c * size; k++) data[(floor(k / size) * out.b + b) * size + (k % size)] = pictures[b][k];
      return out;
    }
  }

  // Compute a tensor, and free all memory that was taken on the way. The result moves down to where that began.
  function tidy(compute) {
    const start = memory.top;
    const result = compute();
    const numbers = result.c * result.columns;
    new Uint8Array(memory.buffer).copyWithin(start, result.address, result.address + 4 * numbers);
    memory.top = start;
    result.address = memory.allocate(numbers);
    return result;
  }

  // --- the matrix product -------------------------------------------------------------------------------------------

  // C [M N] = A [M K] · B [K N] + bias (+ C). A and C are given by the address of the first number, and by how many
  // numbers lie between the beginnings of two rows. B's number (k, j) lies at b + 4 · (rows[k] + cols[j]): see
  // gemm.wat.
  function product(M, N, K, [a, lda], b, rows, cols, [c, ldc], bias = 0, add = 0) {
    const start = memory.top;
    const panels = ceil(N / 8);
    // As many panels at once as fit into the processor's second cache, beside the rows of A that they are multiplied
    // by.
    const group = min(panels, max(1, floor(8192 / K)));
    const [table, packed] = [memory.allocate(8 * panels + K), memory.allocate(group * K * 8)];
    const offsets = memory.integers(table, 8 * panels + K);
    for (let j = 0; j < 8 * panels; j++) offsets[j] = 4 * cols[j < N ? j : 0]; // the last panel is filled up
    for (let k = 0; k < K; k++) offsets[8 * panels + k] = 4 * rows[k];
    for (let p = 0; p < panels; p += group) {
      pack(b, table + 32 * p, table + 32 * panels, K, min(group, panels - p), packed);
      gemm(M, min(8 * group, N - 8 * p), K, a, 4 * lda, packed, c + 32 * p, 4 * ldc, bias, add);
    }
    memory.top = start;
  }

  // 0, step, 2 · step …: the offsets of the rows or columns of a plain matrix.
  const range = (count, step = 1) => new Int32Array(count).map((_, i) => i * step);

  // The same for three indices, of which the last runs fastest: all i · p + j · q + k · r.
  const grid = ([a, b, c], [p, q, r]) =>
    range(a * b * c).map((at) => floor(at / b / c) * p + (floor(at / c) % b) * q + (at % c) * r);

  // The product of a layer's weights with B, plus its bias, if it has one, and plus a residual, if there is one -> out.
  function multiply(w, b, rows, cols, out, residual) {
    if (residual) out.data.set(residual.data);
    const [M, N, K, bias] = [out.c, out.columns, rows.length, "bias" in w ? w.bias.address : 0];
    product(M, N, K, [w.weight.address, K], b, rows, cols, [out.address, N], bias, residual ? 1 : 0);
    return out;
  }

  // W x + b, for each column of x: [c …] -> [c_out …]. A residual [c_out …] is added.
  function linear(w, x, residual = null) {
    const out = new Tensor(w.weight.shape[0], x.b, x.h, x.w);
    return multiply(w, x.address, range(x.c, x.columns), range(x.columns), out, residual);
  }

  // A convolution with a square kernel. `before`: how many zeros stand on the left and above; `after`: on the right and
  // below. It becomes a matrix product by "im2col": one column for each pixel of the output, holding the patch of the
  // input that the kernel sees there. `pack` gathers the patches, so the whole matrix is never in memory.
  function conv2d(w, x, { stride = 1, before = 1, after = 1, residual = null } = {}) {
    const [c_out, , side] = w.weight.shape; // [c_out c k k]
    if (side === 1) return linear(w, x, residual);
    const [high, wide] = [x.h + before + after, x.w + before + after];
    const out = new Tensor(c_out, x.b, floor((high - side) / stride) + 1, floor((wide - side) / stride) + 1);
    const start = memory.top;
    const padded = new Tensor(x.c, x.b, high, wide);
    const [from, to] = [x.data, padded.data.fill(0)];
    for (let k = 0, row = 0; row < x.c * x.b * x.h; row++) {
      const at = (floor(row / x.h) * high + (row % x.h) + before) * wide + before;
      for (let j = 0; j < x.w; j++) to[at + j] = from[k++];
    }
    const rows = grid([x.c, side, side], [x.b * high * wide, wide, 1]);
    const cols = grid([x.b, out.h, out.w], [high * wide, stride * wide, stride]);
    multiply(w, padded.address, rows, cols, out, residual);
    memory.top = start;
    return out;
  }

  // --- norms and activations ----------------------------------------------------------------------------------------

  const scaleAndShift = (w, c) => [memory.floats(w.weight.address, c), memory.floats(w.bias.address, c)]; // γ, β

  // Mean 0 and variance 1 over each of 32 groups of channels, within one picture; then each channel's own scale γ and
  // shift β (Wu & He 2018, arXiv:1803.08494). With `activate`, SiLU follows: x · sigmoid(x), in the same pass.
  function groupNorm(w, x, eps, activate = false) {
    const out = new Tensor(x.c, x.b, x.h, x.w);
    const [from, to, size] = [x.data, out.data, x.h * x.w];
    const [gamma, beta] = scaleAndShift(w, x.c);
    const [sums, squares, count] = [new Float64Array(32 * x.b), new Float64Array(32 * x.b), (x.c / 32) * size];
    const group = (plane) => floor((floor(plane / x.b) * 32) / x.c) * x.b + (plane % x.b);
    for (let k = 0, plane = 0; plane < x.c * x.b; plane++)
      for (const g = group(plane), end = k + size; k < end; k++) {
        sums[g] += from[k];
        squares[g] += from[k] * from[k];
      }
    for (let k = 0, plane = 0; plane < x.c * x.b; plane++) {
      const [c, g] = [floor(plane / x.b), group(plane)];
      const mean = sums[g] / count;
      const slope = gamma[c] / sqrt(squares[g] / count - mean * mean + eps); // the variance is E[x²] - E[x]²
      const shift = beta[c] - mean * slope;
      for (const end = k + size; k < end; k++) {
        const y = from[k] * slope + shift;
        to[k] = activate ? y / (1 + exp(-y)) : y;
      }
    }
    return out;
  }

  // The same over the channels of each column, which is a token: LayerNorm, with torch's ε.
  function layerNorm(w, x) {
    const out = new Tensor(x.c, x.b, x.h, x.w);
    const [from, to, n] = [x.data, out.data, x.columns];
    const [gamma, beta] = scaleAndShift(w, x.c);
    const [mean, square] = [new Float64Array(n), new Float64Array(n)];
    // Row by row, for all columns at once, because the numbers of a row are neighbours in memory.
    for (let k = 0, c = 0; c < x.c; c++)
      for (let j = 0; j < n; j++, k++) {
        mean[j] += from[k] / x.c;
        square[j] += (from[k] * from[k]) / x.c;
      }
    const scale = square.map((value, j) => 1 / sqrt(value - mean[j] * mean[j] + 1e-5));
    for (let k = 0, c = 0; c < x.c; c++)
      for (let j = 0; j < n; j++, k++) to[k] = (from[k] - mean[j]) * scale[j] * gamma[c] + beta[c];
    return out;
  }

  // x · sigmoid(x), which overwrites x. With the slope 1.702, it is CLIP's "quick GELU".
  function silu(x, slope = 1) {
    const data = x.data;
    for (let k = 0; k < data.length; k++) data[k] /= 1 + exp(-slope * data[k]);
    return x;
  }

  // x Φ(x), where Φ is the normal distribution: the exact GELU. JavaScript has no error function. This is a polynomial
  // for 1 - erf, off by at most 1.5e-7 (Abramowitz & Stegun, "Handbook of Mathematical Functions", 7.1.26).
  function gelu(x) {
    const z = abs(x) * Math.SQRT1_2;
    const t = 1 / (1 + 0.3275911 * z);
    const sum = 0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)));
    const tail = 0.5 * t * sum * exp(-z * z);
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
    for (let k = 0, row = 0; row < x.c * x.b * h; row++) {
      const start = (floor(row / h) * x.h + floor(((row % h) * x.h) / h)) * x.w;
      for (let j = 0; j < w; j++) to[k++] = from[start + floor((j * x.w) / w)];
    }
    return out;
  }

  return { Tensor, tidy, product, range, linear, conv2d, groupNorm, layerNorm, silu, gelu, concat, enlarge };
});
