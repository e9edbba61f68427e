// Stage 1: torch's noise, and the schedule that says how much of it there is. Beside minisd/noising.py.
minisdLive.push(function noising() {
  const { fround, log, log1p, sqrt, cos, sin, PI } = Math;

  // torch.Generator().manual_seed(seed) on a CPU, so that a seed means the same noise here and there: the Mersenne
  // Twister (Matsumoto & Nishimura 1998), 624 words of 32 bits that are mixed anew when all are used up.
  class Generator {
    constructor(seed) {
      const w = (this.words = new Uint32Array(624));
      w[0] = seed; // its low 32 bits, as torch
      for (let i = 1; i < 624; i++) w[i] = Math.imul(1812433253, w[i - 1] ^ (w[i - 1] >>> 30)) + i;
      this.used = 624;
      this.waiting = []; // Box-Muller makes numbers in pairs. The second of a pair waits here
    }

    random() {
      if (this.used === 624) this.mix();
      let y = this.words[this.used++];
      y ^= y >>> 11;
      y ^= (y << 7) & 0x9d2c5680;
      y ^= (y << 15) & 0xefc60000;
      return (y ^ (y >>> 18)) >>> 0;
    }

    mix() {
      const w = this.words;
      for (let i = 0; i < 624; i++) {
        const y = (w[i] & 0x80000000) | (w[(i + 1) % 624] & 0x7fffffff);
        w[i] = w[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      this.used = 0;
    }

    // In [0, 1): 24 bits for a float32, 53 bits out of two words for a float64.
    uniform = () => (this.random() & 0xffffff) / 2 ** 24;
    uniform64 = () => ((this.random() & 0x1fffff) * 2 ** 32 + this.random()) / 2 ** 53;
  }

  // n numbers of N(0, 1), by Box-Muller: √(-2 log u₁) times cos and sin of 2π u₂. torch draws fewer than 16 numbers one
  // after the other in float64, and more in blocks of 16 in float32: u₁ is the first half of a block, u₂ the second.
  function randn(n, generator) {
    if (n < 16) return new Float32Array(n).map(() => one(generator));
    const x = new Float32Array(n);
    for (let start = 0; start + 16 <= n; start += 16) block(x.subarray(start, start + 16), generator);
    // What is left over after the last block is drawn, too, but then the last 16 are drawn anew.
    for (let left = n % 16; left > 0; left--) generator.uniform();
    if (n % 16) block(x.subarray(n - 16), generator);
    return x;
  }

  function block(u, generator) {
    u.set(u.map(generator.uniform));
    for (let j = 0; j < 8; j++) {
      const radius = fround(sqrt(fround(-2 * fround(log(fround(1 - u[j]))))));
      const angle = fround(fround(2 * PI) * u[j + 8]);
      u[j] = radius * fround(cos(angle));
      u[j + 8] = radius * fround(sin(angle));
    }
  }

  function one(generator) {
    if (generator.waiting.length) return generator.waiting.pop();
    const [u1, u2] = [generator.uniform64(), generator.uniform64()];
    const radius = sqrt(-2 * log1p(-u2));
    generator.waiting.push(radius * sin(2 * PI * u1));
    return radius * cos(2 * PI * u1);
  }

  // T numbers β_t, and ᾱ_t = (1 - β_0) … (1 - β_t): the share of the picture's variance that is left after step t.
  class NoiseSchedule {
    constructor(betas) {
      let product = 1;
      this.timesteps = betas.length; // T
      this.alphas_cumprod = Float64Array.from(betas, (beta) => (product *= 1 - beta));
    }

    // The schedule that config.json describes.
    static from({ beta_schedule = "scaled_linear", linear_start = 0.00085, linear_end = 0.012, timesteps = 1000 }) {
      // ᾱ_t = f(t) / f(0),  f(t) = cos²( (t/T + s) / (1 + s) · π/2 ), with s = 0.008         (Improved DDPM, eq. 17)
      const f = (t) => cos((((t / timesteps + 0.008) / 1.008) * PI) / 2) ** 2;
      const betas = {
        scaled_linear: () => linspace(sqrt(linear_start), sqrt(linear_end), timesteps).map((root) => root * root), // SD
        linear: () => linspace(linear_start, linear_end, timesteps), // DDPM
        cosine: () => new Float64Array(timesteps).map((_, t) => Math.min(1 - f(t + 1) / f(t), 0.999)),
      }[beta_schedule];
      if (!betas) throw new Error(`There is no schedule "${beta_schedule}".`);
      return new NoiseSchedule(betas());
    }

    alpha_bar = (t) => this.alphas_cumprod[t];

    // x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε                                                                       (DDPM, eq. 4)
    q_sample(x_0, t, noise) {
      const a = this.alpha_bar(t);
      return x_0.map((x, i) => sqrt(a) * x + sqrt(1 - a) * noise[i]);
    }

    // The noise in x_t, from what a UNet predicts: ε itself, v, or x_0.
    predict_noise(parameterization, x_t, t, prediction) {
      const a = this.alpha_bar(t);
      // ε = √(1-ᾱ_t) x_t + √ᾱ_t v                                   (Salimans & Ho 2022, arXiv:2202.00512, appendix D)
      if (parameterization === "v") return x_t.map((x, i) => sqrt(1 - a) * x + sqrt(a) * prediction[i]);
      // ε = (√(1/ᾱ_t) x_t - x_0) / √(1/ᾱ_t - 1)
      if (parameterization === "x0") return x_t.map((x, i) => (sqrt(1 / a) * x - prediction[i]) / sqrt(1 / a - 1));
      return prediction;
    }
  }

  // As torch, which counts the second half from its end.
  function linspace(start, end, count) {
    const step = (end - start) / (count - 1);
    return new Float64Array(count).map((_, i) => (i < count / 2 ? start + i * step : end - (count - 1 - i) * step));
  }

  return { Generator, randn, NoiseSchedule };
});
