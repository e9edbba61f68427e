// The memory in which everything is computed, and the matrix product that nearly all of the time goes to.
//
// Each file of this folder is one function in a list. A page loads the files as plain scripts, and live.js makes a worker
// from their texts, so that the engine also runs from a file that was opened by a double click: there, a page may not
// fetch its own files. A file takes what it needs from `live`, and puts in what it offers.
(globalThis.minisdLive ??= []).push(function gemm(live) {
  // gemm.wat, assembled:   npx --package wabt wat2wasm gemm.wat -o - | base64 -w 0
  // sha256 of that gemm.wat: ffbaa964f3c7bc5952620065c26cf18efd0181b87c011f913711428db71048d5
  const ASSEMBLED = "AGFzbQEAAAABFwJgBn9/f39/fwBgCn9/f39/f39/f38AAhABBGxpdmUGbWVtb3J5AgABAwMCAAEHDwIEcGFjawAABGdlbW0AAQq4CALMAgELfwNAIAAgASgCAGohCSAAIAEoAgRqIQogACABKAIIaiELIAAgASgCDGohDCAAIAEoAhBqIQ0gACABKAIUaiEOIAAgASgCGGohDyAAIAEoAhxqIRAgAUEgaiEBIAMhBiACIQggDCAJa0EMRiAQIA1rQQxGcQRAA0AgCCgCACEHIAUgByAJav0ABAD9CwQAIAUgByANav0ABAD9CwQQIAVBIGohBSAIQQRqIQggBkEBayIGDQALBQNAIAgoAgAhByAFIAcgCWoqAgA4AgAgBSAHIApqKgIAOAIEIAUgByALaioCADgCCCAFIAcgDGoqAgA4AgwgBSAHIA1qKgIAOAIQIAUgByAOaioCADgCFCAFIAcgD2oqAgA4AhggBSAHIBBqKgIAOAIcIAVBIGohBSAIQQRqIQggBkEBayIGDQALCyAEQQFrIgQNAAsL5wUCEH8LeyAAQQFrIQsDQCAKQQFqIQwgCkECaiENIApBA2ohDiAMIAsgDCALSBshDCANIAsgDSALSBshDSAOIAsgDiALSBshDiAGIAogB2xqIRYgBiAMIAdsaiEXIAYgDSAHbGohGCAGIA4gB2xqIRkgBCERIAUhDwNAIAgEQCAIIApBAnRq/QkCACEaIBohHSAaIR4gCCAMQQJ0av0JAgAhGiAaIR8gGiEgIAggDUECdGr9CQIAIRogGiEhIBohIiAIIA5BAnRq/QkCACEaIBohIyAaISQF/QwAAAAAAAAAAAAAAAAAAAAAIRogGiEdIBohHiAaIR8gGiEgIBohISAaISIgGiEjIBohJAsgCQRAIB0gFv0ABAD95AEhHSAeIBb9AAQQ/eQBIR4gHyAX/QAEAP3kASEfICAgF/0ABBD95AEhICAhIBj9AAQA/eQBISEgIiAY/QAEEP3kASEiICMgGf0ABAD95AEhIyAkIBn9AAQQ/eQBISQLIAIgCiADbGohEiACIAwgA2xqIRMgAiANIANsaiEUIAIgDiADbGohFSABIRADQCAR/QAEACEbIBH9AAQQIRwgEv0JAgAhGiAdIBogG/3mAf3kASEdIB4gGiAc/eYB/eQBIR4gE/0JAgAhGiAfIBogG/3mAf3kASEfICAgGiAc/eYB/eQBISAgFP0JAgAhGiAhIBogG/3mAf3kASEhICIgGiAc/eYB/eQBISIgFf0JAgAhGiAjIBogG/3mAf3kASEjICQgGiAc/eYB/eQBISQgEUEgaiERIBJBBGohEiATQQRqIRMgFEEEaiEUIBVBBGohFSAQQQFrIhANAAsgFiAd/QsEACAWIB79CwQQIBcgH/0LBAAgFyAg/QsEECAYICH9CwQAIBggIv0LBBAgGSAj/QsEACAZICT9CwQQIBZBIGohFiAXQSBqIRcgGEEgaiEYIBlBIGohGSAPQQFrIg8NAAsgCkEEaiIKIABIDQALCw==";
  const bytes = Uint8Array.from(atob(ASSEMBLED), (letter) => letter.charCodeAt(0));
  // `plain`: as in a browser without WebAssembly's SIMD. A drawing takes about ten times as long there.
  const simd = !live.plain && Boolean(globalThis.WebAssembly?.validate(bytes));

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

  // --- the two functions of gemm.wat, without WebAssembly ---------------------------------------------------------------

  function pack(src, cols, rows, K, panels, dst) {
    const f = new Float32Array(memory.buffer);
    const offsets = new Int32Array(memory.buffer);
    for (let panel = 0, to = dst / 4; panel < panels; panel++)
      for (let k = 0; k < K; k++)
        for (let j = 0; j < 8; j++) f[to++] = f[(src + offsets[rows / 4 + k] + offsets[cols / 4 + 8 * panel + j]) / 4];
  }

  // In blocks of 2 rows and 4 columns: as many sums as a processor has registers for.
  function gemm(M, K, a, lda, b, panels, c, ldc, bias, add) {
    const f = new Float32Array(memory.buffer);
    for (let m = 0; m < M; m += 2)
      for (let quad = 0; quad < 2 * panels; quad++) {
        const next = Math.min(m + 1, M - 1); // the last row stands in for one that is missing
        let s0 = 0, s1 = 0, s2 = 0, s3 = 0; // of row m
        let t0 = 0, t1 = 0, t2 = 0, t3 = 0; // of the next
        let p = b / 4 + 8 * K * (quad >> 1) + 4 * (quad & 1);
        let i = (a + m * lda) / 4;
        let j = (a + next * lda) / 4;
        for (let k = 0; k < K; k++, p += 8) {
          const x = f[i++];
          const y = f[j++];
          s0 += x * f[p];
          s1 += x * f[p + 1];
          s2 += x * f[p + 2];
          s3 += x * f[p + 3];
          t0 += y * f[p];
          t1 += y * f[p + 1];
          t2 += y * f[p + 2];
          t3 += y * f[p + 3];
        }
        const finish = (row, sums) => {
          const to = (c + row * ldc) / 4 + 4 * quad;
          for (let l = 0; l < 4; l++) f[to + l] = sums[l] + (bias ? f[bias / 4 + row] : 0) + (add ? f[to + l] : 0);
        };
        finish(m, [s0, s1, s2, s3]);
        if (next > m) finish(next, [t0, t1, t2, t3]);
      }
  }

  Object.assign(live, { memory, pack, gemm, simd });
  if (simd) Object.assign(live, new WebAssembly.Instance(new WebAssembly.Module(bytes), { live: { memory: pages } }).exports);
});
