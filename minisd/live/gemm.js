// The memory in which everything is computed, and the matrix product that nearly all of the time goes to.
//
// Each file of this folder is one function in a list. A page loads the files as plain scripts, and live.js makes a worker
// from their texts, so that the engine also runs from a file that was opened by a double click: there, a page may not
// fetch its own files. A file takes what it needs from `live`, and puts in what it offers.
(globalThis.minisdLive ??= []).push(function gemm(live) {
  // gemm.wat, assembled:   npx --package wabt wat2wasm gemm.wat -o - | base64 -w 110
  const ASSEMBLED = `
    AGFzbQEAAAABFwJgBn9/f39/fwBgCn9/f39/f39/f38AAhABBGxpdmUGbWVtb3J5AgABAwMCAAEHDwIEcGFjawAABGdlbW0AAQq4CALMAgELfw
    NAIAAgASgCAGohCSAAIAEoAgRqIQogACABKAIIaiELIAAgASgCDGohDCAAIAEoAhBqIQ0gACABKAIUaiEOIAAgASgCGGohDyAAIAEoAhxqIRAg
    AUEgaiEBIAMhBiACIQggDCAJa0EMRiAQIA1rQQxGcQRAA0AgCCgCACEHIAUgByAJav0ABAD9CwQAIAUgByANav0ABAD9CwQQIAVBIGohBSAIQQ
    RqIQggBkEBayIGDQALBQNAIAgoAgAhByAFIAcgCWoqAgA4AgAgBSAHIApqKgIAOAIEIAUgByALaioCADgCCCAFIAcgDGoqAgA4AgwgBSAHIA1q
    KgIAOAIQIAUgByAOaioCADgCFCAFIAcgD2oqAgA4AhggBSAHIBBqKgIAOAIcIAVBIGohBSAIQQRqIQggBkEBayIGDQALCyAEQQFrIgQNAAsL5w
    UCEH8LeyAAQQFrIQsDQCAKQQFqIQwgCkECaiENIApBA2ohDiAMIAsgDCALSBshDCANIAsgDSALSBshDSAOIAsgDiALSBshDiAGIAogB2xqIRYg
    BiAMIAdsaiEXIAYgDSAHbGohGCAGIA4gB2xqIRkgBCERIAUhDwNAIAgEQCAIIApBAnRq/QkCACEaIBohHSAaIR4gCCAMQQJ0av0JAgAhGiAaIR
    8gGiEgIAggDUECdGr9CQIAIRogGiEhIBohIiAIIA5BAnRq/QkCACEaIBohIyAaISQF/QwAAAAAAAAAAAAAAAAAAAAAIRogGiEdIBohHiAaIR8g
    GiEgIBohISAaISIgGiEjIBohJAsgCQRAIB0gFv0ABAD95AEhHSAeIBb9AAQQ/eQBIR4gHyAX/QAEAP3kASEfICAgF/0ABBD95AEhICAhIBj9AA
    QA/eQBISEgIiAY/QAEEP3kASEiICMgGf0ABAD95AEhIyAkIBn9AAQQ/eQBISQLIAIgCiADbGohEiACIAwgA2xqIRMgAiANIANsaiEUIAIgDiAD
    bGohFSABIRADQCAR/QAEACEbIBH9AAQQIRwgEv0JAgAhGiAdIBogG/3mAf3kASEdIB4gGiAc/eYB/eQBIR4gE/0JAgAhGiAfIBogG/3mAf3kAS
    EfICAgGiAc/eYB/eQBISAgFP0JAgAhGiAhIBogG/3mAf3kASEhICIgGiAc/eYB/eQBISIgFf0JAgAhGiAjIBogG/3mAf3kASEjICQgGiAc/eYB
    /eQBISQgEUEgaiERIBJBBGohEiATQQRqIRMgFEEEaiEUIBVBBGohFSAQQQFrIhANAAsgFiAd/QsEACAWIB79CwQQIBcgH/0LBAAgFyAg/QsEEC
    AYICH9CwQAIBggIv0LBBAgGSAj/QsEACAZICT9CwQQIBZBIGohFiAXQSBqIRcgGEEgaiEYIBlBIGohGSAPQQFrIg8NAAsgCkEEaiIKIABIDQAL
    Cw==`;

  // WebAssembly's memory is one array of bytes, which can only grow. So memory is handed out as a stack: `allocate` takes
  // from its top, and `tidy` (layers.js) sets the top back when a layer is done. An address counts bytes from the start.
  const PAGE = 65536;
  const memory = {
    top: 64, // 0 stands for "none"
    buffer: new ArrayBuffer(0),
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

  function grow(pages) {
    try {
      memory.grow(pages);
    } catch {
      throw new Error(`The browser has no memory left for the model, which needs ${Math.ceil(memory.top / 1e6)} MB.`);
    }
  }

  function withWebAssembly() {
    const pages = new WebAssembly.Memory({ initial: 1 });
    memory.grow = (count) => {
      pages.grow(count);
      memory.buffer = pages.buffer;
    };
    const bytes = Uint8Array.from(atob(ASSEMBLED.replace(/\s/g, "")), (letter) => letter.charCodeAt(0));
    const instance = new WebAssembly.Instance(new WebAssembly.Module(bytes), { live: { memory: pages } });
    Object.assign(live, instance.exports, { simd: true });
  }

  // The same two functions for a browser without WebAssembly's SIMD. They take about five times as long.
  function withoutWebAssembly() {
    memory.grow = (count) => {
      const larger = new Uint8Array(memory.buffer.byteLength + count * PAGE);
      larger.set(new Uint8Array(memory.buffer));
      memory.buffer = larger.buffer;
    };

    function pack(src, cols, rows, K, panels, dst) {
      const f = new Float32Array(memory.buffer);
      const i = new Int32Array(memory.buffer);
      for (let panel = 0, to = dst / 4; panel < panels; panel++)
        for (let k = 0; k < K; k++)
          for (let j = 0; j < 8; j++) f[to++] = f[(src + i[rows / 4 + k] + i[cols / 4 + 8 * panel + j]) / 4];
    }

    // Blocks of 2 rows and 4 columns: as many sums as a processor has registers for.
    function gemm(M, K, a, lda, b, panels, c, ldc, bias, add) {
      const f = new Float32Array(memory.buffer);
      for (let m = 0; m < M; m += 2) {
        const next = Math.min(m + 1, M - 1); // the last row stands in for one that is missing
        for (let quad = 0; quad < 2 * panels; quad++) {
          const to = (c + m * ldc) / 4 + 4 * quad;
          const toNext = (c + next * ldc) / 4 + 4 * quad;
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
          finish(f, [s0, s1, s2, s3], to, bias && bias / 4 + m, add);
          if (next > m) finish(f, [t0, t1, t2, t3], toNext, bias && bias / 4 + next, add);
        }
      }
    }

    function finish(f, sums, to, bias, add) {
      for (let l = 0; l < 4; l++) f[to + l] = sums[l] + (bias ? f[bias] : 0) + (add ? f[to + l] : 0);
    }
    Object.assign(live, { pack, gemm, simd: false });
  }

  try {
    if (live.plain) throw new Error("The page asks for it.");
    withWebAssembly();
  } catch {
    withoutWebAssembly();
  }
  Object.assign(live, { memory });
});
