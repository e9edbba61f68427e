// The memory in which everything is computed, and the matrix product that nearly all of the time goes to.
//
// Each file of this folder is one function in a list. A page loads the files as plain scripts, and live.js makes a
// worker from their texts, so that the engine also runs from a file that was opened by a double click: there, a page
// may not fetch its own files. A function takes what it needs from those before it, and returns what it offers.
globalThis.minisdLive = [];
minisdLive.push(function gemm({ plain }) {
  // gemm.wat, assembled:   npx --package wabt wat2wasm gemm.wat -o - | base64 -w 0
  // sha256 of that gemm.wat: 98912ffe0b1689b4368f79069a01fe1bfcb3df68d0f754ad1c3ac9db12b36725
  const ASSEMBLED = "AGFzbQEAAAABHgNgBn9/f39/fwBgBH9/e3sAYAp/f39/f39/f39/AAIQAQRsaXZlBm1lbW9yeQIAAQMEAwABAgcPAgRwYWNrAAAEZ2VtbQACCowJA8wCAQt/A0AgACABKAIAaiEJIAAgASgCBGohCiAAIAEoAghqIQsgACABKAIMaiEMIAAgASgCEGohDSAAIAEoAhRqIQ4gACABKAIYaiEPIAAgASgCHGohECABQSBqIQEgAyEGIAIhCCAMIAlrQQxGIBAgDWtBDEZxBEADQCAIKAIAIQcgBSAHIAlq/QAEAP0LBAAgBSAHIA1q/QAEAP0LBBAgBUEgaiEFIAhBBGohCCAGQQFrIgYNAAsFA0AgCCgCACEHIAUgByAJaioCADgCACAFIAcgCmoqAgA4AgQgBSAHIAtqKgIAOAIIIAUgByAMaioCADgCDCAFIAcgDWoqAgA4AhAgBSAHIA5qKgIAOAIUIAUgByAPaioCADgCGCAFIAcgEGoqAgA4AhwgBUEgaiEFIAhBBGohCCAGQQFrIgYNAAsLIARBAWsiBA0ACwtoACABQQROBEAgACAC/QsEACABQQhOBEAgACAD/QsEEA8LIAMhAiAAQRBqIQAgAUEEayEBCyABQQFOBEAgACAC/VoCAAALIAFBAk4EQCAAIAL9WgIEAQsgAUEDTgRAIAAgAv1aAggCCwvSBQIQfwt7IABBAWshCwNAIApBAWohDCAKQQJqIQ0gCkEDaiEOIAwgCyAMIAtIGyEMIA0gCyANIAtIGyENIA4gCyAOIAtIGyEOIAYgCiAHbGohFiAGIAwgB2xqIRcgBiANIAdsaiEYIAYgDiAHbGohGSAFIREgASEPA0AgCARAIAggCkECdGr9CQIAIRogGiEdIBohHiAIIAxBAnRq/QkCACEaIBohHyAaISAgCCANQQJ0av0JAgAhGiAaISEgGiEiIAggDkECdGr9CQIAIRogGiEjIBohJAX9DAAAAAAAAAAAAAAAAAAAAAAhGiAaIR0gGiEeIBohHyAaISAgGiEhIBohIiAaISMgGiEkCyAJBEAgHSAW/QAEAP3kASEdIB4gFv0ABBD95AEhHiAfIBf9AAQA/eQBIR8gICAX/QAEEP3kASEgICEgGP0ABAD95AEhISAiIBj9AAQQ/eQBISIgIyAZ/QAEAP3kASEjICQgGf0ABBD95AEhJAsgAyAKIARsaiESIAMgDCAEbGohEyADIA0gBGxqIRQgAyAOIARsaiEVIAIhEANAIBH9AAQAIRsgEf0ABBAhHCAS/QkCACEaIB0gGiAb/eYB/eQBIR0gHiAaIBz95gH95AEhHiAT/QkCACEaIB8gGiAb/eYB/eQBIR8gICAaIBz95gH95AEhICAU/QkCACEaICEgGiAb/eYB/eQBISEgIiAaIBz95gH95AEhIiAV/QkCACEaICMgGiAb/eYB/eQBISMgJCAaIBz95gH95AEhJCARQSBqIREgEkEEaiESIBNBBGohEyAUQQRqIRQgFUEEaiEVIBBBAWsiEA0ACyAWIA8gHSAeEAEgFyAPIB8gIBABIBggDyAhICIQASAZIA8gIyAkEAEgFkEgaiEWIBdBIGohFyAYQSBqIRggGUEgaiEZIA9BCGsiD0EASg0ACyAKQQRqIgogAEgNAAsL";
  const bytes = Uint8Array.from(atob(ASSEMBLED), (letter) => letter.charCodeAt(0));
  // `plain`: as in a browser without WebAssembly's SIMD. A drawing takes about fifteen times as long there.
  const simd = !plain && Boolean(globalThis.WebAssembly?.validate(bytes));

  // Memory is one array of bytes, which can only grow. It is handed out as a stack: `allocate` takes from its top, and
  // `tidy` (layers.js) sets the top back when a layer is done. An address counts bytes from the start.
  const PAGE = 65536;
  const pages = simd && new WebAssembly.Memory({ initial: 1 });
  const memory = {
    top: 64, // the address 0 stands for "none"
    buffer: simd ? pages.buffer : new ArrayBuffer(PAGE),
    allocate(numbers) {
      const address = memory.top;
      memory.top += 16 * Math.ceil(numbers / 4); // four float32 at a time, as SIMD reads them
      const missing = memory.top - memory.buffer.byteLength;
      // A little more than is needed, because a buffer that grows is moved, and every view of it has to be made anew.
      if (missing > 0) grow(Math.ceil(missing / PAGE) + 256);
      return address;
    },
    floats: (address, numbers) => new Float32Array(memory.buffer, address, numbers),
    integers: (address, numbers) => new Int32Array(memory.buffer, address, numbers),
  };

  function grow(count) {
    try {
      if (simd) pages.grow(count);
      const larger = simd ? pages.buffer : new ArrayBuffer(memory.buffer.byteLength + count * PAGE);
      if (!simd) new Uint8Array(larger).set(new Uint8Array(memory.buffer));
      memory.buffer = larger;
    } catch {
      throw new Error(`The browser has no memory left for the model, which needs ${Math.ceil(memory.top / 1e6)} MB.`);
    }
  }

  // --- the two functions of gemm.wat, without WebAssembly ------------------------------------------------------------

  function pack(src, cols, rows, K, panels, dst) {
    const f = new Float32Array(memory.buffer);
    const offsets = new Int32Array(memory.buffer);
    for (let panel = 0, to = dst / 4; panel < panels; panel++)
      for (let k = 0; k < K; k++)
        for (let j = 0; j < 8; j++) f[to++] = f[(src + offsets[rows / 4 + k] + offsets[cols / 4 + 8 * panel + j]) / 4];
  }

  function gemm(M, N, K, a, lda, b, c, ldc, bias, add) {
    const f = new Float32Array(memory.buffer);
    for (let m = 0; m < M; m++)
      for (let n = 0; n < N; n++) {
        const to = (c + m * ldc) / 4 + n;
        let sum = (bias ? f[bias / 4 + m] : 0) + (add ? f[to] : 0);
        let p = b / 4 + 8 * K * (n >> 3) + (n & 7); // the column in its panel
        for (let i = (a + m * lda) / 4, end = i + K; i < end; i++, p += 8) sum += f[i] * f[p];
        f[to] = sum;
      }
  }

  const compiled = simd && new WebAssembly.Instance(new WebAssembly.Module(bytes), { live: { memory: pages } }).exports;
  return { memory, simd, pack, gemm, ...compiled };
});
