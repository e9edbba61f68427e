// Reads a .safetensors file: 8 bytes with the length of the header, the header (JSON: each tensor's type, shape and
// place), then the numbers. The weights ship as float16; everything is computed in float32, as torch does on a CPU.
minisdLive.push(function safetensors({ memory }) {
  // The tensors of the three networks, copied into the engine's memory, as a tree of {address, shape} in which the
  // names of the checkpoint are paths: weights.model.diffusion_model.time_embed[0].weight. If there are several files,
  // a tensor of a later one replaces that of an earlier one.
  function readWeights(buffers) {
    const tree = part([]);
    for (const buffer of buffers) {
      const { header, start } = readHeader(buffer);
      for (const [name, { dtype, shape, data_offsets: [from, to] = [] }] of Object.entries(header)) {
        if (!/^(model\.diffusion|first_stage|cond_stage)_model\./.test(name) || !(dtype in TABLES)) continue;
        const [path, numbers] = [name.split("."), shape.reduce((a, b) => a * b, 1)];
        const add = (at, word, i) => (word in at ? at[word] : (at[word] = part(path.slice(0, i + 1))));
        const tensor = path.reduce(add, tree);
        if (!("address" in tensor)) Object.assign(tensor, { shape, address: memory.allocate(numbers) });
        const bytes = new Uint8Array(buffer, start + from, to - from);
        // They go to the end of the tensor's place. From there, floats of 16 bits are made longer one by one: each is
        // read before another is written over it, because the last ones end together.
        const at = tensor.address + 4 * numbers - bytes.length;
        new Uint8Array(memory.buffer).set(bytes, at);
        const [floats, table] = [memory.floats(tensor.address, numbers), TABLES[dtype]];
        if (table) new Uint16Array(memory.buffer, at, numbers).forEach((half, i) => (floats[i] = table[half]));
      }
    }
    return tree;
  }

  // A part of the tree. It says what is missing. (`"bias" in w` asks whether there is one.)
  function part(path) {
    const get = (at, name) => {
      if (name in at) return at[name];
      throw new Error(`The weights have no ${[...path, name].join(".")}, which this model needs.`);
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

  // All 65,536 floats of 16 bits as float32: sign, exponent of so many bits, fraction.
  function table(bits) {
    const one = 2 ** (15 - bits); // a fraction of 1
    return new Float32Array(65536).map((_, half) => {
      const [sign, exponent, fraction] = [half >> 15 ? -1 : 1, Math.floor((half & 32767) / one), (half % one) / one];
      if (exponent === 2 ** bits - 1) return fraction ? NaN : sign * Infinity;
      return sign * (exponent ? 1 + fraction : 2 * fraction) * 2 ** (exponent - 2 ** (bits - 1) + 1);
    });
  }

  const TABLES = { F16: table(5), BF16: table(8), F32: null };

  return { readWeights };
});
