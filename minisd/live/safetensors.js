// Reads a .safetensors file: 8 bytes with the length of the header, the header (JSON: each tensor's type, shape and
// place), then the numbers. The weights ship as float16; everything is computed in float32, as torch does on a CPU.
(globalThis.minisdLive ??= []).push(function safetensors(live) {
  const { memory } = live;

  // The tensors of the three networks, copied into the engine's memory, as a tree of {address, shape} in which the names
  // of the checkpoint are paths: weights.model.diffusion_model.time_embed[0].weight. If there are several files, a tensor
  // of a later one replaces that of an earlier one.
  function readWeights(buffers) {
    const found = new Map();
    for (const buffer of buffers) {
      const { header, start } = readHeader(buffer);
      for (const [name, { dtype, shape, data_offsets }] of Object.entries(header)) {
        if (!/^(model\.diffusion_model|first_stage_model|cond_stage_model)\./.test(name) || !(dtype in READERS)) continue;
        const [from, end] = data_offsets;
        found.set(name, { shape, read: (to) => READERS[dtype](buffer.slice(start + from, start + end), to) });
      }
    }
    const tree = node("");
    for (const [name, { shape, read }] of found) {
      const numbers = shape.reduce((a, b) => a * b, 1);
      const address = memory.allocate(numbers);
      read(memory.floats(address, numbers));
      const path = name.split(".");
      const leaf = path.pop();
      const parent = path.reduce((at, part, i) => (part in at ? at[part] : (at[part] = node(path.slice(0, i + 1)))), tree);
      parent[leaf] = { shape, address };
    }
    return tree;
  }

  // A part of the tree, which says what is missing. (`"bias" in part` asks whether there is one.)
  function node(path) {
    const get = (part, name) => {
      if (name in part) return part[name];
      throw new Error(`The weights have no ${[...path, name].join(".")}, which config.json asks for.`);
    };
    return new Proxy({}, { get });
  }

  function readHeader(buffer) {
    try {
      const start = 8 + Number(new DataView(buffer).getBigUint64(0, true));
      const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, start - 8)));
      const end = Math.max(...Object.values(header).map((tensor) => tensor.data_offsets?.[1] ?? 0));
      if (start + end > buffer.byteLength) throw new Error("it ends too early");
      return { header, start };
    } catch (error) {
      throw new Error(`The weights are no whole .safetensors file (${error.message}). Fetch them again.`);
    }
  }

  // The bytes of one tensor -> float32.
  const READERS = {
    F32: (bytes, to) => to.set(new Float32Array(bytes)),
    F16: (bytes, to) => new Uint16Array(bytes).forEach((half, i) => (to[i] = HALVES[half])),
    BF16: (bytes, to) => {
      const bits = new Uint32Array(to.buffer, to.byteOffset, to.length);
      new Uint16Array(bytes).forEach((half, i) => (bits[i] = half << 16)); // the upper half of a float32
    },
  };

  // All 65,536 float16 as float32: sign, 5 bits of exponent, 10 bits of fraction.
  const HALVES = new Float32Array(65536).map((_, half) => {
    const [sign, exponent, fraction] = [half >> 15 ? -1 : 1, (half >> 10) & 31, half & 1023];
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : (fraction / 1024) * 2 ** -14);
  });

  Object.assign(live, { readWeights });
});
