// The page's pictures of tensors: on a canvas, one pixel for each number, and the curve as SVG.
globalThis.minisdFigures = (() => {
  // Give the canvas that size, and colour each pixel: colour(x, y) -> [red, green, blue], each 0 … 255.
  function paint(canvas, width, height, colour) {
    const image = new ImageData(width, height);
    for (let k = 0; k < width * height; k++) image.data.set([...colour(k % width, Math.floor(k / width)), 255], 4 * k);
    picture(canvas, { rgba: image.data, width, height });
  }

  // A picture as the engine sends it.
  function picture(canvas, { rgba, width, height }) {
    Object.assign(canvas, { width, height });
    canvas.getContext("2d").putImageData(new ImageData(rgba, width, height), 0, 0);
  }

  // Negative blue, zero white, positive red. `value` lies in [-1, 1].
  function signed(value) {
    const left = 255 * (1 - Math.min(Math.abs(value), 1));
    return value < 0 ? [left, left + (255 - left) * 0.35, 255] : [255, left + (255 - left) * 0.2, left];
  }

  // The channels of x [c h w] side by side, with one column between them, symmetric about 0.
  function latent(canvas, x, [c, h, w]) {
    const largest = x.reduce((most, value) => Math.max(most, Math.abs(value)), 1e-9);
    const colour = (i, y) => {
      const [channel, column] = [Math.floor(i / (w + 1)), i % (w + 1)];
      return column === w ? [128, 128, 128] : signed(x[(channel * h + y) * w + column] / largest);
    };
    paint(canvas, c * (w + 1) - 1, h, colour);
  }

  // Attention [height width] over a picture: the less a pixel reads the word, the darker it becomes. The largest weight
  // is shown bright, or `most` if it is given. Without a picture, the weights alone, from black to white.
  function map(canvas, values, width, height, { over = null, most = Math.max(...values) } = {}) {
    const [wide, high] = over ? [over.width, over.height] : [width, height];
    const colour = (x, y) => {
      const weight = values[Math.floor((y * height) / high) * width + Math.floor((x * width) / wide)];
      const light = Math.min(weight / (most || 1), 1);
      if (!over) return [255 * light, 255 * light, 255 * light];
      const at = 4 * (y * wide + x);
      return [0, 1, 2].map((k) => over.rgba[at + k] * (0.15 + 0.85 * light));
    };
    paint(canvas, wide, high, colour);
  }

  // Curves in a box of 100 by 40. curves: {class: [y, …]}, each evenly spaced and in [0, 1]. marks: [{x, y, r, class}],
  // with x in [0, 1].
  function curve(svg, curves, marks = []) {
    const [wide, high] = [100, 40];
    svg.setAttribute("viewBox", `-2 -2 ${wide + 4} ${high + 4}`);
    const add = (tag, attributes) => {
      const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
      for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
      svg.append(element);
    };
    svg.replaceChildren();
    for (const [name, points] of Object.entries(curves)) {
      const at = (y, i) => `${((wide * i) / (points.length - 1)).toFixed(2)},${(high * (1 - y)).toFixed(2)}`;
      add("polyline", { class: name, points: Array.from(points, at).join(" ") });
    }
    for (const { x, y, class: name, r = 0.8 } of marks)
      add("circle", { class: name, cx: wide * x, cy: high * (1 - y), r });
  }

  return { picture, latent, map, curve };
})();
