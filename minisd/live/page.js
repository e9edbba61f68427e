// The page: a prompt, the two pictures of each step, and what is behind them. It draws with the engine of live.js.
//
//     const live = new MinisdPage(element, { folder: "model", compact: false });
//     live.addEventListener("step", () => live.run.steps.at(-1));      also "ready", "start", "done", "select", "error"
//     await live.draw({ prompt: "a red fox", seed: 3 });               what is not given stays as it is in the form
//
// live.engine: the MinisdEngine. live.about: what the engine has said about the model, with its config; null before it
// has loaded. live.request: the options of the drawing that is shown. live.run: {start, steps, done} of that drawing,
// the messages of worker.js; a recording has `recorded: true`. live.selected: the step that the slider is on.
(() => {
  const { picture } = minisdFigures;

  const INTERFACE = `
    <form>
      <div class="ask">
        <input name="prompt" aria-label="Prompt" autocomplete="off" spellcheck="false" placeholder="a prompt" />
        <button class="main" name="go">Draw</button>
        <button type="button" name="stop" hidden>Stop</button>
      </div>
    </form>
    <p role="status"></p>
    <div class="pictures">
      <figure><canvas role="img"></canvas><figcaption></figcaption></figure>
      <figure><canvas role="img"></canvas><figcaption></figcaption></figure>
    </div>
    <label class="slider">Step <input type="range" name="step" min="1" value="1" max="1" /> <output></output></label>
  `;

  globalThis.MinisdPage = class extends EventTarget {
    constructor(root, { folder = "model", compact = false } = {}) {
      super();
      const engine = new MinisdEngine(folder);
      Object.assign(this, { root, folder, compact, engine, about: null, request: null, run: null, selected: 0 });
      root.classList.add("minisd");
      root.innerHTML = INTERFACE;
      this.form = root.querySelector("form");
      this.slider = root.querySelector("[name=step]");
      this.form.onsubmit = (event) => {
        event.preventDefault();
        this.draw();
      };
      this.form.stop.onclick = () => engine.cancel();
      this.slider.oninput = () => this.select(this.slider.value - 1);
    }

    say(text) {
      this.root.querySelector("[role=status]").textContent = text;
    }

    tell = (name) => this.dispatchEvent(new Event(name));

    async load() {
      if (this.about) return;
      const progress = (received, total) => this.say(`Fetching the model: ${Math.round((100 * received) / total)} %`);
      this.about = await this.engine.load(progress);
      this.tell("ready");
    }

    async draw(changes = {}) {
      for (const [name, value] of Object.entries(changes)) if (this.form[name]) this.form[name].value = value;
      this.engine.worker && this.engine.cancel();
      this.form.stop.hidden = false;
      try {
        await this.load();
        const options = { steps: 25, guidance: 4, sampler: "dpmpp_2m", seed: 0, preview: 2, attention: true };
        const request = { ...options, prompt: this.form.prompt.value, ...changes };
        const run = { start: null, steps: [], done: null };
        const start = (message) => {
          Object.assign(this, { request, run: Object.assign(run, { start: message }), selected: 0 });
          this.slider.max = message.timesteps.length;
          this.tell("start");
        };
        const step = (message) => {
          run.steps.push(message);
          this.say(`Step ${message.i + 1} of ${run.start.timesteps.length}`);
          this.tell("step");
          if (message.pictures) this.select(message.i);
        };
        const done = await this.engine.draw(request, { start, step });
        this.say(done ? `Drawn in ${done.seconds.toFixed(1)} s.` : "Stopped.");
        if (!done) return;
        run.done = done;
        this.select(run.steps.length - 1);
        this.tell("done");
      } catch (error) {
        this.say(error.message);
        this.error = error.message;
        this.tell("error");
      } finally {
        this.form.stop.hidden = true;
      }
    }

    async select(i) {
      this.selected = i;
      this.slider.value = i + 1;
      const [run, step] = [this.run, this.run?.steps[i]];
      if (!step) return;
      this.tell("select");
      if (!step.pictures) {
        const latents = { latents: [step.x_t, step.x0], shape: run.start.shape };
        const [x_t, x0] = (await this.engine.ask("decode", latents)).pictures;
        step.pictures = { x_t, x0 };
      }
      if (run !== this.run || i !== this.selected) return;
      const last = run.done && i === run.steps.length - 1;
      const canvases = this.root.querySelectorAll("canvas");
      picture(canvases[0], step.pictures.x_t);
      picture(canvases[1], last ? run.done.picture : step.pictures.x0);
      this.root.querySelector("output").textContent = `${i + 1} of ${run.start.timesteps.length}, t = ${step.t}`;
    }
  };
})();
