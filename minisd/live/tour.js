// The guided tour: a dozen stops from the prompt to the picture, each with the tensors of the drawing that is shown.
//
//     const tour = new MinisdTour(live, element, texts);    live: a MinisdPage. texts: the object of tour.json
//     tour.open("attention");                               so does an address that ends in #tour=attention
//
// All words are in tour.json, and a second language is a second such file. In its texts stand **strong**, `code`, x_t
// or x_{t+1} (lowered), W^T (raised), and {t}, a number of the drawing: see `numbers`. A stop has
//
//     id, title, text, caption      what is read; labels, for the canvases of its figure
//     figure                        one of FIGURES, below; by_step: whether it needs the slider
//     shape, sd_v1                  which of `shapes` is shown, and that of Stable Diffusion v1
//     equation, numbers, symbols    the second is the same with {numbers}
//     code, compvis, notebook, exercises
//     by_sampler                    other equations and code for a sampler
//     try                           buttons: what they draw, which step they select, or what they do in the figure
//     check                         a question and its answer
(() => {
  const { latent, map, curve, picture } = minisdFigures;
  const { sqrt, log, floor, round } = Math;

  function h(tag, properties = {}, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  }

  const button = (label, onclick, more) => h("button", { type: "button", onclick, ...more }, ...rich(label));

  // A text of tour.json as nodes. `split` puts what the groups have caught between the plain parts.
  const LETTERS = "([\\p{L}\\p{N}∅]+)";
  const MARKS = `\\*\\*(.+?)\\*\\*|\`(.+?)\`|_\\{(.*?)\\}|_${LETTERS}|\\^\\{(.*?)\\}|\\^${LETTERS}|\\{(\\w+)\\}`;
  function rich(text) {
    return text.split(new RegExp(MARKS, "u")).flatMap((part, i) => {
      const tag = [null, "strong", "code", "sub", "sub", "sup", "sup", "span"][i % 8];
      if (!part) return [];
      if (!tag) return [part];
      if (tag !== "span") return [h(tag, {}, ...(tag === "code" ? [part] : rich(part)))];
      const span = h("span", { className: "value" });
      span.dataset.value = part;
      return [span];
    });
  }

  const plain = (text) => text.replace(/[_^{}*`]/g, "");

  // A number or a shape as text.
  function said(value) {
    if (value?.length && typeof value !== "string") return `[${Array.from(value).join(" ")}]`;
    if (Number.isNaN(value)) return "…";
    return typeof value === "number" ? String(+value.toFixed(4)).replace("-", "−") : (value ?? "…");
  }

  const sum = (x) => x.reduce((total, v) => total + v, 0);
  const rms = (x) => sqrt(sum(x.map((v) => v * v)) / x.length);
  const spread = (x) => sqrt(rms(x) ** 2 - (sum(x) / x.length) ** 2); // standard deviation

  // A canvas on which `paint` has drawn, or an SVG with a curve.
  function painted(paint, ...what) {
    const canvas = paint === curve ? svg() : h("canvas", { role: "img" });
    paint(canvas, ...what);
    return canvas;
  }

  // With a frame around a part of it: left, top, width and height in parts of the canvas.
  function framed(canvas, left, top, width, height) {
    const mark = h("span", { className: "mark" });
    for (const [side, part] of Object.entries({ left, top, width, height })) mark.style[side] = `${100 * part}%`;
    return h("div", { className: "tensor" }, canvas, mark);
  }

  // A latent [c h w], its channels side by side, with a frame around the number `index`. choose(index): one is clicked.
  function numbered(x, [c, height, w], index, choose) {
    const canvas = painted(latent, x, [c, height, w]);
    const wide = c * (w + 1) - 1;
    canvas.onclick = ({ offsetX, offsetY }) => {
      const column = floor((offsetX / canvas.clientWidth) * wide);
      const row = floor(column / (w + 1)) * height + floor((offsetY / canvas.clientHeight) * height);
      choose(row * w + Math.min(column % (w + 1), w - 1));
    };
    const column = floor(index / (height * w)) * (w + 1) + (index % w);
    return framed(canvas, column / wide, (floor(index / w) % height) / height, 1 / wide, 1 / height);
  }

  // Canvases in a row, each above its label.
  function cells(labels, canvases, className = "cells") {
    const figure = (canvas, i) => h("figure", {}, canvas, h("figcaption", {}, ...rich(labels[i])));
    return h("div", { className }, ...canvases.map(figure));
  }

  const svg = () => document.createElementNS("http://www.w3.org/2000/svg", "svg");

  // --- the figures: (tour, stop, run, step) -> the elements of one, or null if the run lacks what it needs -----------

  const FIGURES = {
    overview(tour, { labels }, { start, steps }) {
      const some = steps.filter(({ pictures }) => pictures);
      if (!some.length) return null;
      const at = (part) => painted(picture, some[floor(part * some.length)].pictures.x0);
      return [cells(labels, [painted(latent, start.x_T, start.shape), ...[0.1, 0.2, 0.5, 0.99].map(at)])];
    },

    tokens(tour, stop, { start: { tokens } }) {
      const token = (piece, i) => h("li", {}, piece, " ", h("small", {}, tokens.ids[i]));
      return [h("ol", { className: "tools" }, ...tokens.pieces.map(token))];
    },

    context(tour, stop, { start: { context, tokens } }) {
      const [n, d] = tour.shapes().context;
      const vector = (i) => Array.from({ length: d }, (_, k) => context[k * n + i]);
      const row = (piece, i) => h("div", {}, painted(latent, vector(i), [1, 1, d]), h("span", {}, piece));
      const off = (row, i) => (row.classList.toggle("off", tour.live.request?.hide?.includes(i) ?? false), row);
      return [h("div", { className: "rows" }, ...tokens.pieces.map(row).map(off))];
    },

    noise(tour, { labels }, { start: { x_T, shape } }) {
      const bins = Array.from({ length: 17 }, (_, i) => (i - 8) / 2); // from -4 to 4
      const signal = bins.map((bin) => (4 * x_T.filter((x) => round(2 * x) === 2 * bin).length) / x_T.length);
      const noise = bins.map((bin) => 2 * Math.exp(-(bin ** 2) / 2) / sqrt(2 * Math.PI));
      return [painted(latent, x_T, shape), painted(curve, { noise, signal })].map((x, i) => cells([labels[i]], [x]));
    },

    unet(tour, { labels }, { start }, { x_t, eps, activations }) {
      const { time_embed, ...maps } = activations ?? {};
      if (!time_embed) return null;
      // Of a block's channels, the one that varies most from pixel to pixel.
      const most = ({ c, h: height, w, values }) => {
        const channels = Array.from({ length: c }, (_, i) => values.subarray(i * height * w, (i + 1) * height * w));
        return channels.reduce((best, channel) => (spread(channel) > spread(best) ? channel : best));
      };
      const block = ([name, map]) => {
        const canvas = painted(latent, most(map), [1, map.h, map.w]);
        return h("figure", {}, canvas, name, h("br"), h("small", {}, said([map.c, map.h, map.w])));
      };
      // Level by level: the way down on the left, the way up on the right, and the middle block below them.
      const blocks = Object.entries(maps);
      const those = (part, height) => blocks.filter(([name, map]) => name.startsWith(part) && height === map.h);
      const side = (...which) => h("div", { className: "tools" }, ...those(...which).map(block));
      const heights = [...new Set(blocks.map(([, map]) => map.h))].sort((a, b) => b - a);
      const level = (height) => [side("input", height), h("span", {}, "→"), side("output", height)];
      const bottom = ["", side("middle", heights.at(-1)), ""].map((part) => h("span", {}, part));
      const u = h("div", { className: "u" }, ...heights.flatMap(level), ...bottom);
      return [cells(labels, [x_t, eps].map((x) => painted(latent, x, start.shape))), u];
    },

    time(tour, { labels }, { steps }, step) {
      if (!step.activations?.time_embed) return null;
      const { half } = tour.numbers();
      const wave = (t, i) => (i < half ? Math.cos : Math.sin)(t * 10000 ** (-(i % half) / half));
      const waves = ({ t }) => Array.from({ length: 2 * half }, (_, i) => wave(t, i));
      const embedded = ({ activations }) => Array.from(activations.time_embed.values);
      return [waves, embedded].map((row, k) => {
        const rows = steps.map(row);
        const canvas = painted(latent, rows.flat(), [1, rows.length, rows[0].length]);
        return cells([labels[k]], [framed(canvas, -0.02, step.i / rows.length, 0.01, 1 / rows.length)]);
      });
    },

    attention(tour, stop, { start: { tokens } }, step) {
      const layers = Object.keys(step.attention ?? {});
      if (!layers.length) return null;
      const middle = layers.findIndex((name) => name.startsWith("middle"));
      if (tour.dial.max - layers.length + 1) Object.assign(tour.dial, { max: layers.length - 1, value: middle });
      tour.layer = layers[tour.dial.value];
      tour.dialled.value = tour.layer.split(".transformer")[0];
      const { h: height, w, weights } = step.attention[tour.layer];
      const [size, pad] = [height * w, tokens.pieces.indexOf("<pad>")];
      const word = (piece, i) => {
        // All the padding is shown as one.
        const places = i === pad ? tokens.pieces.length - pad : 1;
        const values = new Float32Array(size);
        for (let k = 0; k < places * size; k++) values[k % size] += weights[i * size + k];
        const share = `${said(round((1000 * sum(values)) / size) / 10)} %`;
        const canvas = painted(map, values, w, height, { over: tour.live.shown?.x0 });
        const label = places > 1 ? `${piece} × ${places}` : piece;
        return h("figure", {}, canvas, label, h("br"), h("small", {}, share));
      };
      return [h("div", { className: "words" }, ...tokens.pieces.slice(0, pad + 1 || undefined).map(word))];
    },

    async guidance(tour, { labels }, { start }, { eps_cond, eps_uncond, x_t, a_t }) {
      if (!eps_cond) return null;
      const s = Number((tour.dialled.value = tour.dial.value));
      const eps = eps_uncond.map((e, k) => e + s * (eps_cond[k] - e));
      const change = eps_cond.map((e, k) => e - eps_uncond[k]);
      const x0 = x_t.map((x, k) => (x - sqrt(1 - a_t) * eps[k]) / sqrt(a_t));
      const [decoded] = await tour.decode([x0]);
      const last = decoded ? painted(picture, decoded) : painted(latent, x0, start.shape);
      const [arrow, at] = [svg(), (s) => 8 + 4.2 * s];
      const name = (s, y, low = "", hat = "") => `<circle cx="${at(s)}" cy="8" r="1"/>
        <text x="${at(s)}" y="${y}">ε${hat}<tspan dy="1" font-size="2.6">${low}</tspan></text>`;
      const line = (to, light) => `<path class="signal" opacity="${light}" d="M${at(0)} 8H${at(to)}m-2-1 2 1-2 1"/>`;
      arrow.setAttribute("viewBox", "0 0 100 18");
      arrow.innerHTML = `${line(20, 0.3)}${line(s, 1)}
        <g fill="currentColor" stroke-width="0" font-size="3.5" text-anchor="middle"><text x="92" y="4">s = 20</text>
        ${name(0, 4, "uncond")}${name(1, 14, "cond")}${name(s, s < 4 ? 4 : 14, "", "\u0302")}</g>`;
      const noises = [eps_uncond, eps_cond, change, eps].map((x) => painted(latent, x, start.shape));
      return [cells(labels, [...noises, last], "pair"), arrow];
    },

    async step(tour, { labels }, { start, steps, done }, { i, x_t, eps, x0, x, pictures }) {
      const choose = (index) => ((tour.index = index), tour.refresh());
      tour.deeds.another = () => choose(floor(Math.random() * x.length));
      const latents = [x_t, eps, x0, x].map((values) => numbered(values, start.shape, tour.index, choose));
      const decoded = await tour.decode([x_t, x0, x]);
      // A recording has them already.
      const next = steps[i + 1]?.pictures?.x_t ?? done?.picture;
      if (!decoded.length && pictures && next) decoded.push(pictures.x_t, pictures.x0, next);
      return [cells(labels, latents, "pair"), cells(labels.slice(4), decoded.map((made) => painted(picture, made)))];
    },

    loop(tour, { labels }, { steps }, now) {
      const some = steps.filter(({ pictures }) => pictures);
      const turn = (step) => {
        const canvases = [step.pictures.x_t, step.pictures.x0].map((made) => painted(picture, made));
        const onclick = () => tour.live.select(step.i);
        return h("button", { type: "button", ariaPressed: step === now, onclick }, ...canvases, `t = ${step.t}`);
      };
      const every = Math.ceil(some.length / 7);
      const strip = some.filter((step, k) => k % every === 0 || step === some.at(-1)).map(turn);
      const { alphas_cumprod } = tour.live.schedule;
      const place = ({ t, a_t }) => ({ x: 1 - t / (alphas_cumprod.length - 1), y: a_t });
      const marks = steps.map((step) => ({ ...place(step), class: step === now ? "current" : "visited" }));
      const schedule = painted(curve, { signal: alphas_cumprod.slice().reverse() }, marks);
      return [h("div", { className: "tools" }, ...strip), cells(labels, [schedule])];
    },

    async decoding(tour, { labels }, { start, steps, done }) {
      if (!done) return null;
      const [, height, w] = start.shape;
      const size = height * w;
      // `changed` is the place that the reader has changed in this run: 3 is about three standard deviations.
      if (tour.changed?.done !== done) tour.changed = { done, index: w * floor(height / 2) + floor(w / 2), by: 0 };
      const { index, by } = tour.changed;
      const poke = (index, by = 3) => (Object.assign(tour.changed, { index, by }), tour.refresh());
      const another = () => poke(floor(Math.random() * size));
      tour.deeds = { poke: () => poke(index), heal: () => poke(index, 0), another };
      const z = steps.at(-1).x.map((v, k) => (k % size === index % size ? v + by : v));
      const [made] = by ? await tour.decode([z]) : [];
      return [cells(labels, [numbered(z, start.shape, index, poke), painted(picture, made ?? done.picture)], "pair")];
    },

    training(tour, { labels }, { start, steps, done }) {
      if (!done) return null;
      const { alphas_cumprod } = tour.live.schedule;
      const t = round((tour.dial.value / 10) * alphas_cumprod.length) - 1;
      const [x_0, a] = [steps.at(-1).x, alphas_cumprod[t]];
      // What the UNet has been asked about, if it was for this drawing and this t; else a mixture of our own.
      const example = tour.example?.done === done && tour.example.t === t ? tour.example.latents : null;
      const latents = example ?? [x_0, start.x_T, x_0.map((x, k) => sqrt(a) * x + sqrt(1 - a) * start.x_T[k])];
      const loss = example && rms(example[1].map((e, k) => e - example[3][k])) ** 2;
      tour.dialled.value = example ? `${t}, ${labels[4]} ${said(loss)}` : t;
      tour.deeds.guess = () => tour.guess(t, tour.dial.value / 10);
      return [cells(labels, latents.map((x) => painted(latent, x, start.shape)), "pair")];
    },

    next(tour, { stages }) {
      const name = (stage) => tour.link(`notebooks/${stage}.html`, stage.replaceAll("_", " "));
      const list = stages.map(([stage, says]) => h("li", {}, name(stage), ": ", ...rich(says)));
      return [h("ul", {}, ...list), h("h4", {}, tour.texts.ui.check), ...tour.texts.stops.map(tour.question)];
    },
  };

  // --- the tour ------------------------------------------------------------------------------------------------------

  globalThis.MinisdTour = class {
    constructor(live, element, texts) {
      // index: the number of the latent for which equations are worked out. layer: the one whose attention is shown.
      Object.assign(this, { live, element, texts, index: 0, layer: null, stop: null });
      element.lang = texts.language;
      element.classList.add("minisd", "minisd-tour");
      for (const name of ["start", "step", "done", "select"]) live.addEventListener(name, () => this.refresh());
      live.prepared.then(() => this.leaveTheEnd());
      // A figure's slider that stands for an option of the drawing follows it.
      live.addEventListener("start", () => this.stop?.dial?.of && (this.dial.value = live.request[this.stop.dial.of]));
      document.addEventListener("keydown", ({ key, target, ctrlKey, altKey, metaKey }) => {
        const to = { ArrowLeft: -1, ArrowRight: 1 }[key];
        const ours = this.stop && (target === document.body || element.contains(target));
        if (to && ours && !ctrlKey && !altKey && !metaKey && !target.matches("input, select")) this.go(to);
      });
      globalThis.addEventListener("hashchange", () => this.readAddress());
      if (!this.readAddress()) this.close();
    }

    get run() {
      return this.live.run;
    }

    get step() {
      return this.run?.steps[this.live.selected] ?? this.run?.steps.at(-1);
    }

    readAddress() {
      const id = new URLSearchParams(location.hash.slice(1)).get("tour");
      if (id !== null && id !== this.stop?.id) this.open(id);
      return id !== null;
    }

    // The rest of the address is the page's.
    writeAddress() {
      const state = new URLSearchParams(location.hash.slice(1));
      if (this.stop) state.set("tour", this.stop.id);
      else state.delete("tour");
      if (`#${state}` !== (location.hash || "#")) history.replaceState(null, "", `#${state}`);
    }

    // What is left is the button that opens it.
    close() {
      const focused = this.element.contains(document.activeElement);
      this.stop = null;
      this.writeAddress();
      this.element.replaceChildren(button(this.texts.ui.start, () => this.open()));
      if (focused) this.element.firstChild.focus();
    }

    // A drawing ends at its last step. Those stops that have a slider show more at a middle one.
    leaveTheEnd() {
      const { live, run, stop } = this;
      if (!stop?.by_step || !run?.done || live.selected < run.steps.length - 1) return;
      clearInterval(live.film);
      live.select(floor(live.selected / 2));
    }

    go(by) {
      const stop = this.texts.stops[this.texts.stops.indexOf(this.stop) + by];
      if (stop) this.open(stop.id);
    }

    // Show a stop, or the first if there is none of that name.
    open(id) {
      const { stops, ui } = this.texts;
      const stop = (this.stop = stops.find((each) => each.id === id) ?? stops[0]);
      const place = stops.indexOf(stop);
      const dot = ({ id, title }, i) => {
        const current = { title: plain(title), ariaCurrent: i === place ? "step" : null };
        return h("li", {}, button(`${i + 1}`, () => this.open(id), current));
      };
      const title = h("h2", { tabIndex: -1, style: "outline: 0" }, ...rich(stop.title));
      const { text, draw } = stop.missing ?? { text: ui.missing };
      this.missing = h("p", { hidden: true }, ...rich(text), " ", button(ui.draw, () => this.draw(draw)));
      this.deeds = {}; // what a figure can be told to do
      this.box = h("div");
      const shape = `${ui.shape} {shape_${stop.shape}}${stop.sd_v1 ? ` (${ui.shape_sd_v1} ${stop.sd_v1})` : ""}`;
      const captions = [stop.caption, ...(stop.shape ? [shape] : [])];
      const deeds = stop.try.map((each) => button(each.label, () => this.act(each)));
      this.says = h("div", { ariaLive: "polite" });
      this.rule = h("section");
      this.element.replaceChildren(
        h("section", { className: "tools" }, h("strong", {}, ui.title), button(ui.close, () => this.close())),
        h("nav", { ariaLabel: ui.stops }, h("ol", { className: "examples" }, ...stops.map(dot))),
        title,
        h("div", { className: "stop" },
          h("section", {}, ...stop.text.map((each) => h("p", {}, ...rich(each)))),
          h("section", { className: "figure" }, ...this.sliders(), this.missing, this.box,
            ...captions.map((each) => h("p", { className: "caption" }, ...rich(each)))),
          h("section", {}, h("h4", {}, ui.try), h("div", { className: "tools try" }, ...deeds), this.says),
          this.rule,
          h("section", {}, ...this.places(stop))),
        h("section", { className: "tools" },
          button(ui.back, () => this.go(-1), { hidden: !place }),
          button(ui.next, () => this.go(1), { className: "main", hidden: stop === stops.at(-1) }))); // prettier-ignore
      this.writeAddress();
      this.leaveTheEnd();
      this.refresh();
      title.focus({ preventScroll: true });
      this.element.scrollIntoView();
    }

    question = ({ check: [question, answer] }) =>
      h("details", {}, h("summary", {}, ...rich(question)), ...rich(answer));

    // The page's slider over the steps, once more, and the figure's own, `dial`.
    sliders() {
      const [{ ui }, { dial, by_step }] = [this.texts, this.stop];
      const slider = (label, options, output) => {
        const input = h("input", { type: "range", ...options });
        return [input, h("label", { className: "steps" }, ...rich(label), input, output)];
      };
      const select = ({ target }) => this.live.select(target.value - 1);
      const value = this.live.request?.[dial?.of] ?? dial?.value;
      const [mirror, first] = slider(ui.slider, { min: 1, oninput: select }, h("output", {}, ...rich(ui.step_of)));
      const [own, second] = slider(dial?.label ?? "", { ...dial, value, oninput: () => this.refresh() }, h("output"));
      Object.assign(this, { mirror, dial: own, dialled: second.lastChild });
      return [...(by_step ? [first] : []), ...(dial ? [second] : [])];
    }

    // Where to go on from here.
    places({ code, compvis, notebook, exercises, check }) {
      if (!code) return []; // the last stop
      const { ui } = this.texts;
      const task = ([name, stage]) => [this.link(`notebooks/exercises/${stage}.html`, name), " "];
      const rows = {
        compvis: [h("code", {}, compvis.name), ` (${compvis.file})`],
        notebook: [this.link(`notebooks/${notebook}.html`, notebook.replaceAll("_", " "))],
        exercise: Object.entries(exercises).flatMap(task),
      };
      const row = ([key, content]) => [h("dt", {}, ui[key]), h("dd", {}, ...content)];
      return [h("dl", {}, ...Object.entries(rows).flatMap(row)), h("h4", {}, ui.check), this.question({ check })];
    }

    // To a page of the docs, if there are any: their build sets `docs`, and the pages of the code with their lines.
    link = (page, name) =>
      "docs" in this.texts ? h("a", { href: this.texts.docs + page }, name) : h("code", {}, name);

    // --- doing something ---------------------------------------------------------------------------------------------

    async draw(changes) {
      await this.live.draw({ attention: true, activations: true, ...changes });
      this.leaveTheEnd();
    }

    async act({ label, draw, select, figure, see }) {
      const { live, run, says, texts: { ui } } = this; // prettier-ignore
      const look = h("p", {}, h("strong", {}, ui.look), " ", ...rich(see));
      says.replaceChildren(look);
      if (figure) return this.deeds[figure]?.();
      if (select) return live.select(select === "first" ? 0 : this.run.steps.length - 1);
      says.append(ui.wait);
      await this.draw(this.changes(draw));
      says.replaceChildren(look);
      if (live.run === run || !live.run.done) return says.append(live.find(".status").textContent); // what failed
      if (!run?.done) return;
      const pictures = [run, live.run].map(({ done }) => painted(picture, done.picture));
      const usual = button(ui.usual, () => (says.replaceChildren(), this.draw(this.texts.usual)));
      says.append(cells([ui.before, `${ui.after}: ${label}`], pictures, "pair"), usual);
      this.refresh();
    }

    // One example of training: the picture of this drawing with noise of the timestep t, and what the UNet says of it.
    guess(t, strength) {
      const [{ engine, request }, { done }] = [this.live, this.run];
      return this.live.work(async () => {
        const { rgba, width, height } = done.picture;
        const { z } = await engine.ask("autoencode", { rgba, width, height });
        // Drawing over a picture begins with just that, at the first of the steps that are left of ten.
        const init = { rgba, width, height, strength };
        const options = { prompt: request.prompt, steps: 10, guidance: 1, sampler: "dpmpp_2m", seed: 1, init };
        let first;
        await engine.draw(options, { step: (step) => (first ??= step) });
        const { x_t, eps, a_t } = first;
        const noise = x_t.map((x, k) => (x - sqrt(a_t) * z[k]) / sqrt(1 - a_t));
        this.example = { done, t, latents: [z, noise, x_t, eps] };
        this.refresh();
      });
    }

    // The options that a button draws with: the usual ones, and what it changes. Words are hidden by their places.
    changes(draw) {
      const { pieces } = this.run?.start.tokens ?? { pieces: [] };
      const end = pieces.indexOf("<end>");
      const places = { thing: [this.thing(pieces)], "all but end": [...pieces.keys()].filter((i) => i !== end) };
      const seed = draw.seed === "next" ? { seed: Number(this.live.request?.seed ?? 0) + 1 } : {};
      return { ...this.texts.usual, ...draw, ...seed, ...(draw.hide in places ? { hide: places[draw.hide] } : {}) };
    }

    // The place of the word for what is drawn: in "a red fox, noto style", that before the comma.
    thing(pieces = this.run.start.tokens.pieces) {
      const comma = pieces.indexOf(",");
      return (comma > 1 ? comma : pieces.indexOf("<end>")) - 1;
    }

    // --- what is shown -----------------------------------------------------------------------------------------------

    // Once for all messages that arrive together.
    refresh() {
      this.waiting ??= requestAnimationFrame(async () => {
        this.waiting = null;
        const { stop, run, step, live } = this;
        if (!stop) return;
        const turn = (this.turn = {}); // while a picture is decoded, another turn may begin
        const elements = step || stop.figure === "next" ? await FIGURES[stop.figure](this, stop, run, step) : null;
        if (turn !== this.turn) return;
        this.turn = null;
        this.missing.hidden = Boolean(elements) || Boolean(run && !run.done);
        this.box.replaceChildren(...(elements ?? []));
        // A drawing that was made without the tour lacks what only the tour shows.
        if (!elements && run?.done && live.about && !stop.missing && !run.request.activations) this.draw();
        this.writeRule(live.request?.sampler);
        if (!step) return;
        Object.assign(this.mirror, { max: run.steps.length, value: step.i + 1 });
        const shapes = Object.entries(this.shapes()).map(([name, shape]) => [`shape_${name}`, shape]);
        const numbers = { ...this.numbers(), ...Object.fromEntries(shapes) };
        for (const place of this.element.querySelectorAll(".value")) {
          const text = said(numbers[place.dataset.value]);
          const inside = place.previousSibling && place.closest(".formula"); // 2 · (−3)
          place.textContent = inside && text.startsWith("−") ? `(${text})` : text;
        }
      });
    }

    // The equation and the line of the code, which depend on the sampler.
    writeRule(sampler) {
      const { stop, texts: { ui } } = this; // prettier-ignore
      const { equation, numbers, symbols = [], code } = { ...stop, ...stop.by_sampler?.[sampler] };
      const formula = (each) => h("p", { className: "formula" }, ...rich(each));
      const lines = (title, all) => (all ? [h("h4", {}, title), ...all.map(formula)] : []);
      const meaning = ([symbol, says]) => [h("dt", {}, ...rich(symbol)), h("dd", {}, ...rich(says))];
      const said = [...lines(ui.equation, equation), ...lines(ui.numbers, this.step && numbers)];
      const all = [...new Set([...(stop.symbols ?? []), ...symbols])];
      const [, module, ...name] = code?.name.split(".") ?? [];
      const place = code && this.link(code.page, `${module}.py: ${name.join(".")}`);
      const written = code ? [h("h4", {}, ui.code), h("pre", {}, h("code", {}, code.line)), h("p", {}, place)] : [];
      this.rule.replaceChildren(...said, h("dl", {}, ...all.flatMap(meaning)), ...written);
    }

    // The shapes of the tensors that are shown.
    shapes() {
      const [{ start }, step] = [this.run, this.step];
      const n = start.tokens.ids.length;
      const layers = step?.attention ?? {};
      const map = layers[this.layer] ?? Object.values(layers)[0];
      const emb = step?.activations?.time_embed;
      const context = [n, start.context.length / n];
      return { tokens: [n], context, latent: start.shape, emb: emb && [emb.c], attention: map && [n, map.h, map.w] };
    }

    // What the texts may name as {numbers}: of the drawing, of the step, and of the one number `index` of its latent.
    numbers() {
      const { live, run, step, index } = this;
      const [{ start, steps }, { a_t, a_prev, i, t }] = [run, step];
      const { request } = live;
      const [n, d] = this.shapes().context;
      const used = start.tokens.pieces.filter((piece) => piece !== "<pad>").length;
      const [c, height, w] = start.shape;
      const made = run.done?.picture ?? live.shown?.x0 ?? {};
      const [numbers, pixels, T] = [c * height * w, 3 * made.width * made.height, live.schedule.timesteps];
      const per_step = step.eps_cond ? 2 : 1;
      const emb_size = 4 * live.config.unet.model_channels;
      const [timesteps, count] = [start.timesteps, start.timesteps.length];
      // As in dpmpp_2m of sampling.js.
      const lambda = (a) => (a < 1 ? log(a / (1 - a)) / 2 : Infinity);
      const [h, old] = [lambda(a_prev) - lambda(a_t), steps[i - 1] ?? step];
      const straight = i === 0 || a_prev === 1 || (i === count - 1 && count < 15);
      const r = straight ? 0 : h / (2 * (lambda(a_t) - lambda(old.a_t)));
      const [x_t, x0, x0_old] = [step.x_t[index], step.x0[index], old.x0[index]];
      const D = x0 + r * (x0 - x0_old);
      return {
        ...request, sampler: this.texts.samplers[request?.sampler], thing: start.tokens.pieces[this.thing()],
        n, d, used, pads: n - used,
        c, numbers, pixels, ratio: pixels / numbers, f: made.height / height, T, last_T: T - 1,
        mean: sum(start.x_T) / numbers, std: spread(start.x_T), emb_size, sines: emb_size / 4, half: emb_size / 8,
        i: i + 1, t, steps: count, first_t: timesteps[0], final_t: timesteps.at(-1), per_step, calls: per_step * count,
        a_t, a_prev, signal_t: sqrt(a_t), noise_t: sqrt(1 - a_t), signal_prev: sqrt(a_prev),
        noise_prev: sqrt(1 - a_prev), x_t, eps: step.eps[index], eps_cond: step.eps_cond?.[index],
        eps_uncond: step.eps_uncond?.[index], x0, x0_old, r, D, eps_D: (x_t - sqrt(a_t) * D) / sqrt(1 - a_t),
        x_prev: step.x[index],
      }; // prettier-ignore
    }

    // The decoder's pictures of latents; none before the model has loaded.
    async decode(latents) {
      if (!this.live.about) return [];
      return (await this.live.engine.ask("decode", { latents, shape: this.run.start.shape })).pictures;
    }
  };
})();
