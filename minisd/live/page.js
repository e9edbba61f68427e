// The page: a prompt, the two pictures of each step, and below them what panels.js adds. The engine of live.js draws.
//
//     const live = new MinisdPage(element, { folder: "model", compact: false });     compact: without the panels
//     live.addEventListener("step", () => live.run.steps.at(-1));
//     await live.draw({ prompt: "a red fox", seed: 3 });         what is not given stays as it is in the form
//     live.select(4);                                            the slider moves to the fifth step
//
// live.engine: the MinisdEngine. live.about: what the engine said about the model, with its config; null before it has
// loaded. live.run: {request, start, steps, done} of the drawing that is shown: its options, and the messages of
// worker.js; `recorded` is true for a recording. live.request: its options, too. live.other: as live.run, for the second
// prompt, or null. live.selected: the step that the slider is on.
//
// Events: "ready", "start", "step", "done", "error"; "select", when the pictures of a step are shown; "other", at each
// step of the second prompt.
(() => {
  const { picture } = minisdFigures;

  // Everything is one form, so that its fields are the whole state of the page, and a link can hold them.
  const FORM = `
    <form>
      <div class="ask">
        <input name="prompt" type="text" aria-label="Prompt" autocomplete="off" spellcheck="false" />
        <button class="main" name="go">Draw</button>
        <button type="button" name="again" title="Draw the same from other noise">New noise</button>
        <button type="button" name="stop" hidden>Stop</button>
      </div>
      <div class="examples" role="group" aria-label="Recorded examples"></div>
      <details class="settings">
        <summary>Settings</summary>
        <div class="fields">
          <label>Negative prompt <input name="negative" type="text" autocomplete="off" /></label>
          <label>Steps <input name="steps" type="number" value="25" min="1" max="1000" required /></label>
          <label>Guidance <input name="guidance" type="number" value="4" step="any" required /></label>
          <label>Sampler <select name="sampler"></select></label>
          <label>Seed <input name="seed" type="number" value="0" min="0" max="${2 ** 53 - 1}" required /></label>
          <label>Show every n-th step <input name="preview" type="number" value="2" min="0" required /></label>
        </div>
      </details>
      <p class="status" role="status"></p>
      <progress hidden max="1" aria-label="Progress"></progress>
      <div class="pictures">
        <figure><canvas role="img"></canvas><figcaption></figcaption></figure>
        <figure><canvas role="img"></canvas><figcaption></figcaption></figure>
      </div>
      <div class="steps">
        <button type="button" name="play" aria-label="Play the steps">▶</button>
        <input name="step" type="range" min="1" max="1" value="1" aria-label="Step" />
        <output name="where"></output>
      </div>
      <input type="hidden" name="hide" /><input type="hidden" name="word" /><input type="hidden" name="init" />
      <div class="panels"></div>
    </form>`;

  const CAPTIONS = {
    x_t: "<b>x<sub>t</sub></b> what goes into the step",
    x0: "<b>x̂<sub>0</sub></b> the model’s guess of the picture",
    done: "<b>x<sub>0</sub></b> the picture",
  };

  globalThis.MinisdPage = class extends EventTarget {
    constructor(root, { folder = "model", compact = false } = {}) {
      super();
      root.classList.add("minisd");
      root.innerHTML = FORM; // no text of a reader is ever set like this
      const form = root.querySelector("form");
      Object.assign(this, { root, form, fields: form.elements, engine: new MinisdEngine(folder), name: folder });
      Object.assign(this, { about: null, request: null, run: null, other: null, selected: 0, turn: 0, wanted: {} });
      const samplers = this.part("sampling")?.SAMPLERS ?? {};
      for (const name in samplers) this.fields.sampler.add(new Option(name, name, false, name === "dpmpp_2m"));
      if (!compact) minisdPanels.forEach((panel) => this.addPanel(panel));
      this.listen();
      this.prepared = this.prepare();
    }

    // A part of the engine, for what the page itself computes.
    part = (name) => globalThis.minisdLive?.find((part) => part.name === name)({});
    find = (selector) => this.root.querySelector(selector);
    tell = (name) => this.dispatchEvent(new Event(name));

    addPanel({ name, title, html, mount }) {
      const details = document.createElement("details");
      details.className = `panel ${name}`;
      details.innerHTML = `<summary>${title}</summary><div class="body">${html}</div>`;
      details.open = name === "attention";
      this.find(".panels").append(details);
      mount(this, details);
    }

    listen() {
      const { form, fields } = this;
      form.onsubmit = (event) => {
        event.preventDefault();
        this.draw();
      };
      fields.again.onclick = () => this.draw({ seed: Math.floor(Math.random() * 2 ** 31) });
      fields.stop.onclick = () => this.stop() && this.say("Stopped.");
      fields.play.onclick = () => this.play();
      fields.step.oninput = () => {
        clearInterval(this.film);
        this.browsing = true; // until the next drawing: the steps that arrive don't move the slider
        this.select(fields.step.value - 1);
      };
      form.addEventListener("input", () => this.summarise());
      form.addEventListener("change", () => this.remember());
      addEventListener("hashchange", () => this.restore());
      this.summarise();
    }

    // --- what is known before the model has loaded -------------------------------------------------------------------

    async prepare() {
      const { name, bytes, config, prompts = [] } = await this.engine.script("recording.js").catch(() => ({}));
      if (config) {
        this.configure(config, name);
        this.engine.readModel = this.engine.readScripts; // there are scripts, so don't look for a folder first
      }
      const example = (prompt, k) => {
        const button = Object.assign(document.createElement("button"), { type: "button", textContent: prompt });
        button.onclick = () => (this.about ? this.draw({ prompt }) : this.replay(k).catch(this.fail));
        return button;
      };
      this.find(".examples").replaceChildren(...prompts.map(example));
      const linked = this.restore();
      if (!linked && prompts.length) await this.replay(0).catch(this.fail);
      const size = bytes ? ` (${Math.ceil(bytes / 1e6)} MB)` : "";
      const begin = linked ? "Press Draw to see the drawing of this link." : this.run ? "This is a recording." : "";
      this.say(`${begin} The first Draw fetches the model${size}. Then everything is computed on your device.`);
      // A link into the tour shows one step.
      if (this.run && !location.hash && !matchMedia("(prefers-reduced-motion: reduce)").matches) this.play();
    }

    configure(config, name = this.name) {
      const T = config.timesteps ?? 1000;
      Object.assign(this, { config, name, schedule: this.part("noising").NoiseSchedule.from(config) });
      this.fields.steps.max = T;
      this.tell("configured");
    }

    // Show a recorded drawing as if it had just been made.
    async replay(k) {
      const recording = await this.engine.script(`recording_${k}.js`);
      this.write(recording.request);
      this.stop();
      Object.assign(this, { request: recording.request, run: await unpack(recording, this.schedule), other: null });
      this.tell("start");
      await this.select(this.run.steps.length - 1);
      this.tell("done");
    }

    // --- drawing -----------------------------------------------------------------------------------------------------

    async load() {
      if (this.about) return;
      const progress = (received, total) => {
        this.say("Fetching the model …");
        if (total) this.find("progress").value = received / total;
      };
      const ready = await this.engine.load(progress);
      const { config } = this.engine.model;
      this.configure(config);
      this.about = { ...ready, config };
      this.tell("ready");
    }

    // Stop what is being done, and begin something else: an answer that belongs to an earlier turn is out of date.
    stop() {
      if (this.engine.worker) this.engine.cancel();
      clearInterval(this.film);
      this.busy(false);
      return ++this.turn;
    }

    busy = (busy) => (this.fields.stop.hidden = this.find("progress").hidden = !busy);

    // Do something with the model, loaded if it is not yet. What was being done is stopped. `task` is told how to ask
    // whether it is still wanted.
    async work(task) {
      const turn = this.stop();
      const wanted = () => turn === this.turn;
      this.find("progress").removeAttribute("value");
      this.busy(true);
      try {
        await this.load();
        if (wanted()) await task(wanted);
      } catch (error) {
        this.fail(error);
      }
      if (wanted()) this.busy(false);
    }

    // Ask the engine for a drawing, and collect its messages. `told` is called after each.
    async collect(request, told) {
      const run = { request, start: null, steps: [], done: null };
      const start = (message) => told(Object.assign(run, { start: message }));
      const step = (message) => told(run, run.steps.push(message));
      run.done = await this.engine.draw(request, { start, step });
      return run;
    }

    async draw(changes = {}) {
      this.write(changes);
      if (!this.form.reportValidity()) return;
      await this.work(async (wanted) => {
        const request = { ...(await this.read()), ...changes, hide: this.hidden() };
        this.browsing = false;
        this.other = null;
        const run = await this.collect(request, (run) => wanted() && this.follow(run, request));
        if (!wanted() || !run.done) return;
        this.finish(run);
        if (!this.fields.second?.value) return;
        const prompt = this.fields.second.value;
        const told = (other) => wanted() && Object.assign(this, { other }).tell("other");
        told(await this.collect({ ...request, prompt }, told));
      });
    }

    // After each message of a drawing.
    follow(run, request) {
      const [count, at] = [run.start.timesteps.length, run.steps.length];
      if (!at) {
        Object.assign(this, { run, request, selected: 0 });
        this.fields.step.max = count;
        return this.tell("start");
      }
      this.find("progress").value = at / count;
      this.say(`Step ${at} of ${count}`);
      this.tell("step");
      if (run.steps.at(-1).pictures && !this.browsing) this.select(at - 1);
    }

    finish(run) {
      const { lost } = run.start.tokens;
      const notes = [`Drawn on this device in ${run.done.seconds.toFixed(1)} s.`];
      if (lost) notes.push(`The model reads ${this.about.max_length} tokens, so “${lost}” did not fit.`);
      if (!this.about.simd) notes.push("This browser lacks WebAssembly’s SIMD, so drawing takes much longer.");
      this.say(notes.join(" "));
      this.select(this.browsing ? this.selected : (this.wanted.step ?? run.steps.length) - 1);
      this.wanted = {};
      this.tell("done");
      this.remember();
    }

    say = (text) => Object.assign(this.find(".status"), { textContent: text, className: "status" });

    fail = (error) => {
      this.say(error.message);
      this.find(".status").classList.add("error");
      this.tell("error");
    };

    // --- the steps ---------------------------------------------------------------------------------------------------

    // Both pictures of a step, decoded now if they were not while it was drawn.
    async pictures(run, i) {
      const step = run.steps[i];
      if (!step.pictures) {
        step.decoding ??= this.engine.ask("decode", { latents: [step.x_t, step.x0], shape: run.start.shape });
        const [x_t, x0] = (await step.decoding).pictures;
        step.pictures = { x_t, x0 };
      }
      const last = run.done && i === run.steps.length - 1;
      return { x_t: step.pictures.x_t, x0: last ? run.done.picture : step.pictures.x0, last };
    }

    async select(i) {
      const { run, fields } = this;
      if (!run?.steps.length) return;
      const [count, at] = [run.start.timesteps.length, Math.max(0, Math.min(i, run.steps.length - 1))];
      const { t } = run.steps[at];
      this.selected = at;
      Object.assign(fields.step, { max: count, value: at + 1 });
      fields.step.setAttribute("aria-valuetext", `${at + 1} of ${count}, t = ${t}`);
      fields.where.value = `${at + 1} of ${count} · t = ${t}`;
      const shown = await this.pictures(run, at).catch(this.fail);
      if (!shown || run !== this.run || at !== this.selected) return;
      this.shown = shown;
      this.showPicture(0, shown.x_t, "x_t");
      this.showPicture(1, shown.x0, shown.last ? "done" : "x0");
      this.tell("select");
    }

    showPicture(k, shown, caption) {
      const figure = this.root.querySelectorAll(".pictures figure")[k];
      figure.lastChild.innerHTML = CAPTIONS[caption];
      picture(figure.firstChild, shown);
      figure.firstChild.setAttribute("aria-label", `${figure.lastChild.textContent}, step ${this.selected + 1}`);
    }

    // The steps as a film.
    play() {
      clearInterval(this.film);
      const last = this.run?.steps.length - 1;
      if (!(last > 0)) return;
      this.browsing = true;
      this.select(this.selected === last ? 0 : this.selected);
      this.film = setInterval(() => {
        this.select(this.selected + 1);
        if (this.selected >= last) clearInterval(this.film);
      }, 120);
    }

    // --- the form and the link ---------------------------------------------------------------------------------------

    write(changes) {
      for (const [name, value] of Object.entries(changes)) {
        if (!(this.fields[name] instanceof HTMLElement)) continue;
        if (this.fields[name].type === "checkbox") this.fields[name].checked = value;
        else this.fields[name].value = value;
      }
      this.summarise();
      this.tell("written");
    }

    // The request that the form describes.
    async read() {
      const { prompt, negative, sampler, steps, guidance, seed, preview } = this.fields;
      const numbers = { steps: +steps.value, guidance: +guidance.value, seed: +seed.value, preview: +preview.value };
      const texts = { prompt: prompt.value, negative: negative.value, sampler: sampler.value };
      return { ...texts, ...numbers, init: (await this.init?.()) ?? null, attention: true };
    }

    hidden = () => this.fields.hide.value.split(",").filter(Boolean).map(Number);

    summarise() {
      const { steps, guidance, sampler, seed } = this.fields;
      const text = [`${steps.value} steps`, `guidance ${guidance.value}`, sampler.value, `seed ${seed.value}`];
      this.find(".settings summary").textContent = text.join(" · ");
    }

    // The address of this page in this state.
    link() {
      const state = new URLSearchParams(new FormData(this.form));
      const tour = new URLSearchParams(location.hash.slice(1)).get("tour"); // see tour.js
      if (tour) state.set("tour", tour);
      for (const [name, value] of [...state]) if (!value) state.delete(name);
      return `${location.href.split("#")[0]}#${state}`;
    }

    remember = () => history.replaceState(null, "", this.link());

    // Take the state from the address, if it holds one.
    restore() {
      const state = new URLSearchParams(location.hash.slice(1));
      if (!state.has("prompt")) return false;
      this.form.reset();
      this.wanted = Object.fromEntries(state);
      this.write({ hide: "", word: "", init: "", ...this.wanted });
      return true;
    }
  };

  // --- recordings: see record() in minisd/live/__init__.py -----------------------------------------------------------

  const unpackTensor = ({ one, numbers }) =>
    Float32Array.from(new Int16Array(MinisdEngine.bytes(numbers).buffer), (number) => number * one);

  async function unpack({ request, shape, timesteps, tokens, film, ...packed }, schedule) {
    const steps = timesteps.length;
    const frame = await frames(film, steps);
    const piece = (tensor, size) => (k) => tensor.subarray(size * k, size * (k + 1));
    const at = piece(unpackTensor(packed.latents), shape[0] * shape[1] * shape[2]);
    const context = unpackTensor(packed.context);
    // What each layer or block gave at a step, with `rows` maps, if that is given: the last that is there stands for
    // those that are not. Of a block's c channels, a recording has only one.
    const collected = (tensors, key, rows) => {
      const filled = (part, size) =>
        Float32Array.from({ length: rows * size }, (_, k) => part[Math.min(k, part.length - size + (k % size))]);
      const all = Object.entries(tensors).map(([name, tensor]) => {
        const [values, [h, w]] = [unpackTensor(tensor), tensor.shape.slice(-2)];
        const part = piece(values, values.length / steps);
        return (i) => [name, { c: tensor.c, h, w, [key]: rows ? filled(part(i), h * w) : part(i) }];
      });
      return (i) => Object.fromEntries(all.map((entry) => entry(i)));
    };
    const attention = collected(packed.attention, "weights", tokens.ids.length);
    const activations = collected(packed.activations, "values");
    const run = { request, recorded: true, start: { shape, timesteps, tokens, context, x_T: at(0) }, steps: [] };
    for (const [i, t] of timesteps.entries()) {
      const a_t = schedule.alpha_bar(t);
      const a_prev = i + 1 < steps ? schedule.alpha_bar(timesteps[i + 1]) : 1;
      const [x_t, eps_cond, eps_uncond] = [at(3 * i), at(3 * i + 1), at(3 * i + 2)];
      const eps = eps_uncond.map((e, k) => e + request.guidance * (eps_cond[k] - e));
      const x0 = x_t.map((x, k) => (x - Math.sqrt(1 - a_t) * eps[k]) / Math.sqrt(a_t));
      const x = i + 1 < steps ? at(3 * i + 3) : x0;
      const pictures = { x_t: frame(i, 0), x0: frame(i, 1) };
      const made = { attention: attention(i), activations: activations(i), pictures };
      run.steps.push({ i, t, a_t, a_prev, x_t, eps, eps_cond, eps_uncond, x0, x, ...made });
    }
    return { ...run, done: { picture: frame(steps - 1, 1) } };
  }

  // A film of two rows -> (column, row) -> picture.
  async function frames(address, columns) {
    const film = Object.assign(new Image(), { src: address });
    await film.decode();
    const [width, height] = [film.width / columns, film.height / 2];
    const canvas = Object.assign(document.createElement("canvas"), { width: film.width, height: film.height });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(film, 0, 0);
    return (i, row) => ({ rgba: context.getImageData(i * width, row * height, width, height).data, width, height });
  }
})();
