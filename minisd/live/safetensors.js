// Reads a .safetensors file: 8 bytes with the length of the header, the header (JSON: each tensor's type, shape and
// place), then the numbers. The weights ship as float16; everything is computed in float32, as torch does on a CPU.
(globalThis.minisdLive ??= []).push(function safetensors(live) {
  const { memory } = live;

  // The tensors of the three networks, copied into the engine's memory: {name: {address, shape}}. If there are several
  // files, a tensor of a later one replaces that of an earlier one.
  function readWeights(buffers) {
    const found = new Map();
    for (const buffer of buffers) {
      const { header, numbers } = readHeader(buffer);
      for (const [name, { dtype, shape, data_offsets }] of Object.entries(header))
        if (/^(model\.diffusion_model|first_stage_model|cond_stage_model)\./.test(name) && dtype in READERS)
          found.set(name, { shape, read: () => READERS[dtype](numbers.slice(...data_offsets)) });
    }
    for (const [name, { shape, read }] of found) {
      const values = read();
      const address = memory.allocate(values.length);
      memory.floats(address, values.length).set(values);
      found.set(name, { shape, address });
    }
    return found;
  }

  function readHeader(buffer) {
    try {
      const length = Number(new DataView(buffer).getBigUint64(0, true));
      const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
      const end = Math.max(...Object.values(header).map((tensor) => tensor.data_offsets?.[1] ?? 0));
      if (8 + length + end > buffer.byteLength) throw new Error("it ends too early");
      return { header, numbers: buffer.slice(8 + length) };
    } catch (error) {
      throw new Error(`The weights are no whole .safetensors file (${error.message}). Fetch them again.`);
    }
  }

  const READERS = {
    F32: (bytes) => new Float32Array(bytes),
    F16: (bytes) => Float32Array.from(new Uint16Array(bytes), (half) => HALVES[half]),
    // the upper half of a float32
    BF16: (bytes) => new Float32Array(Uint32Array.from(new Uint16Array(bytes), (half) => half << 16).buffer),
  };

  // All 65,536 float16 as float32: sign, 5 bits of exponent, 10 bits of fraction.
  const HALVES = Float32Array.from({ length: 65536 }, (_, half) => {
    const [sign, exponent, fraction] = [half >> 15 ? -1 : 1, (half >> 10) & 31, half & 1023];
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : (fraction / 1024) * 2 ** -14);
  });

  Object.assign(live, { readWeights });
});
