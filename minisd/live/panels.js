// What unfolds below the pictures. Each panel: {name, title, html, mount}. `mount(live, element)` gives it its life, by
// the events and fields of MinisdPage alone, as the tour does.
globalThis.minisdPanels = (() => {
  const { picture, latent, map, curve } = minisdFigures;

  // An element with a text, which stays text whatever is in it.
  function make(tag, properties = {}, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  }

  const on = (live, names, f) => names.split(" ").forEach((name) => live.addEventListener(name, f));

  // The places of a prompt's tokens: one for each token up to <end>, and one for all padding together.
  function places({ pieces }) {
    const end = pieces.indexOf("<end>");
    const all = pieces.slice(0, end + 1).map((text, i) => ({ text, at: [i] }));
    const padding = pieces.map((_, i) => i).slice(end + 1);
    return padding.length ? [...all, { text: "<pad>", at: padding }] : all;
  }

  // --- attention by word ------------------------------------------------------------------------------------------------

  // How much each pixel reads the tokens at these places: in one layer, or the mean of all, on the grid of the finest.
  function reading(step, layer, at) {
    const maps = layer ? [step.attention[layer]] : Object.values(step.attention);
    const { h, w } = maps.reduce((a, b) => (b.w > a.w ? b : a));
    const values = new Float32Array(h * w);
    for (const map of maps)
      for (let k = 0; k < h * w; k++) {
        const pixel = Math.floor((Math.floor(k / w) * map.h) / h) * map.w + Math.floor(((k % w) * map.w) / w);
        for (const i of at) values[k] += map.weights[i * map.h * map.w + pixel] / maps.length;
      }
    return { values, w, h };
  }

  const attention = {
    name: "attention",
    title: "Which word does each pixel read?",
    html: `
      <p>Bright pixels read that word at this step. Choose a word to see it over the large picture.</p>
      <div class="words" role="group" aria-label="The tokens of the prompt"></div>
      <label>Layer of the UNet <select name="layer"></select></label>
      <p class="says" aria-live="polite"></p>`,
    mount(live, element) {
      const [words, says] = [".words", ".says"].map((selector) => element.querySelector(selector));
      const { layer } = live.fields;
      let [held, pointed] = [null, null]; // the places in `words` of what was clicked, and of what is pointed at

      function begin() {
        held = pointed = null;
        words.replaceChildren(...places(live.run.start.tokens).map(word));
      }

      function word({ text, at }, place) {
        const button = make("button", { type: "button" }, make("canvas"), make("span", { textContent: text }));
        button.dataset.at = at;
        button.classList.toggle("off", at.every((i) => live.request.hide?.includes(i)));
        const point = (to) => () => {
          pointed = to;
          veil();
        };
        button.onpointerenter = button.onfocus = point(place);
        button.onpointerleave = button.onblur = point(null);
        button.onclick = () => {
          held = held === place ? null : place;
          veil();
        };
        return button;
      }

      const places_of = (button) => button.dataset.at.split(",").map(Number);

      // The largest weight that the word gets in this drawing so far is shown white, so that steps can be compared.
      const peak = (at) => Math.max(...live.run.steps.map((step) => Math.max(...reading(step, layer.value, at).values)));

      function show() {
        const step = live.run.steps[live.selected];
        if (!step || !live.shown) return;
        const layers = Object.entries(step.attention);
        if (layer.options.length !== layers.length + 1 || layer.options[1]?.value !== layers[0]?.[0]) {
          const name = ([name, { h, w }]) => new Option(`${name.split(".transformer_blocks")[0]} (${w}×${h})`, name);
          layer.replaceChildren(new Option("all, their mean", ""), ...layers.map(name));
          layer.value = live.wantedLayer ?? "";
        }
        for (const button of words.children) {
          const at = places_of(button);
          const { values, w, h } = reading(step, layer.value, at);
          button.peak = peak(at);
          map(button.firstChild, values, w, h, { over: live.shown.x0, most: button.peak });
        }
        veil();
      }

      function veil() {
        const place = pointed ?? held;
        [...words.children].forEach((button, i) => button.setAttribute("aria-pressed", i === held));
        if (!live.shown) return;
        const canvas = live.find(".pictures figure:last-child canvas");
        const button = words.children[place];
        if (!button) return picture(canvas, live.shown.x0), (says.textContent = "");
        const { values, w, h } = reading(live.run.steps[live.selected], layer.value, places_of(button));
        map(canvas, values, w, h, { over: live.shown.x0, most: button.peak });
        const share = (100 * values.reduce((a, b) => a + b)) / values.length;
        says.textContent =
          `“${button.textContent}” gets ${share.toFixed(1)} % of all reading at this step. ` +
          `The brightest pixel gives it ${(100 * Math.max(...values)).toFixed(0)} %.`;
      }

      on(live, "start", begin);
      on(live, "select", show);
      layer.onchange = show;
    },
  };

  // --- two prompts from the same noise --------------------------------------------------------------------------------------

  // The words of a text as elements, those marked that stand between what both texts begin and end with.
  function marked(text, other) {
    const [words, others] = [text.split(/\s+/), other.split(/\s+/)];
    let [from, back] = [0, 0];
    while (from < words.length && words[from] === others[from]) from++;
    while (back < words.length - from && back < others.length - from && words.at(-1 - back) === others.at(-1 - back)) back++;
    const isCommon = (i) => i < from || i >= words.length - back;
    return words.flatMap((word, i) => [isCommon(i) ? word : make("mark", { textContent: word }), " "]);
  }

  const comparison = {
    name: "comparison",
    title: "Change one word",
    html: `
      <p>A second prompt, drawn from the same noise. At which step do the two part?</p>
      <div class="ask">
        <input name="second" type="text" aria-label="Second prompt" autocomplete="off" spellcheck="false" />
        <button type="button" class="both">Draw both</button>
      </div>
      <div class="pair" hidden>
        <figure><figcaption></figcaption><canvas role="img"></canvas><div class="strip"></div></figure>
        <figure><figcaption></figcaption><canvas role="img"></canvas><div class="strip"></div></figure>
      </div>`,
    mount(live, element) {
      const [pair, figures] = [element.querySelector(".pair"), element.querySelectorAll("figure")];
      element.ontoggle = () => (live.fields.second.value ||= live.fields.prompt.value);
      element.querySelector(".both").onclick = () => live.draw();
      live.fields.second.onkeydown = (event) => event.key === "Enter" && live.draw();

      async function show() {
        const runs = [live.run, live.other];
        pair.hidden = !live.other?.steps.length;
        if (pair.hidden) return;
        const at = Math.min(live.selected, live.other.steps.length - 1);
        const texts = [live.request.prompt, live.fields.second.value];
        const shown = await Promise.all(runs.map((run) => live.pictures(run, at))).catch((error) => live.fail(error));
        if (!shown || runs[1] !== live.other) return;
        figures.forEach((figure, k) => {
          figure.firstElementChild.replaceChildren(...marked(texts[k], texts[1 - k]));
          picture(figure.children[1], shown[k].x0);
          figure.children[1].setAttribute("aria-label", `${texts[k]}, step ${at + 1}`);
          strip(figure.lastElementChild, runs[k]);
        });
      }

      // The guesses that have been decoded, at most eight of them, as small pictures that lead to their step.
      function strip(box, run) {
        const decoded = run.steps.filter((step) => step.pictures);
        const some = decoded.filter((_, k) => k % Math.ceil(decoded.length / 8) === 0);
        const thumbnail = ({ i, t, pictures }) => {
          const button = make("button", { type: "button", title: `step ${i + 1}, t = ${t}` }, make("canvas"));
          button.setAttribute("aria-label", button.title);
          picture(button.firstChild, pictures.x0);
          button.onclick = () => live.select(i);
          return button;
        };
        box.replaceChildren(...some.map(thumbnail));
      }

      on(live, "start select other", show);
    },
  };

  // --- words switched off ------------------------------------------------------------------------------------------------------

  const ablation = {
    name: "ablation",
    title: "Switch words off",
    html: `
      <p>
        The same drawing from the same noise, but no pixel may read that token. Which one carries the picture? (CLIP has
        read the whole sentence before, so each later token knows of those before it.)
      </p>
      <div class="ask">
        <button type="button" class="each">Draw without each token</button>
        <button type="button" class="restore" hidden>Switch all words on</button>
      </div>
      <div class="gallery"></div>`,
    mount(live, element) {
      const [gallery, restore] = [element.querySelector(".gallery"), element.querySelector(".restore")];
      const without = (hide) => live.draw({ hide });
      restore.onclick = () => without([]);

      function card(caption, hide) {
        const button = make("button", { type: "button" }, make("canvas"), make("span", { textContent: caption }));
        button.onclick = () => without(hide);
        button.hide = hide;
        return button;
      }

      element.querySelector(".each").onclick = () =>
        live.work(async (wanted) => {
          const request = { ...(await live.read()), preview: 0, attention: false };
          const all = places(await live.engine.ask("tokenize", { prompt: request.prompt }));
          const but = (text) => all.filter((place) => place.text !== text).flatMap((place) => place.at);
          const each = all.slice(1).map(({ text, at }) => card(`without “${text}”`, at));
          gallery.replaceChildren(card("all tokens", []), ...each, card("only <end>", but("<end>")));
          for (const button of gallery.children) {
            live.say(`Drawing: ${button.textContent}`);
            const done = await live.engine.draw({ ...request, hide: button.hide });
            if (!done || !wanted()) break;
            picture(button.firstChild, done.picture);
          }
          if (wanted()) live.say("Choose one of the pictures to see its steps.");
        });
      on(live, "start written", () => (restore.hidden = !live.hidden().length));
    },
  };

  // --- a picture of one's own -----------------------------------------------------------------------------------------------------

  const own = {
    name: "own",
    title: "Start from a picture of yours",
    html: `
      <p>Draw with the mouse, a finger, or the arrow keys and space; or drop a picture here. It stays on this device.</p>
      <div class="pair">
        <figure>
          <div class="pad">
            <canvas tabindex="0" role="application" aria-label="Your picture: arrow keys move the brush, space paints"></canvas>
            <span class="brush" hidden></span>
          </div>
          <div class="tools">
            <label>Colour <input type="color" class="colour" value="#e8590c" /></label>
            <label>Brush <input type="range" class="width" min="1" max="8" value="3" /></label>
            <label class="button">Choose a picture <input type="file" accept="image/*" class="file" /></label>
            <button type="button" class="clear">Clear</button>
          </div>
        </figure>
        <figure>
          <canvas role="img" class="made" aria-label="What the autoencoder makes of it"></canvas>
          <figcaption>what the autoencoder makes of it</figcaption>
          <canvas role="img" class="latent" aria-label="The latent, its channels side by side"></canvas>
          <figcaption class="shape"></figcaption>
        </figure>
      </div>
      <div class="tools">
        <label><input type="checkbox" name="over" value="1" /> Draw over this picture</label>
        <label>Strength <input type="range" name="strength" min="0.05" max="1" step="0.05" value="0.7" /></label>
        <button type="button" class="go">Draw over it</button>
      </div>`,
    mount(live, element) {
      const find = (selector) => element.querySelector(selector);
      const [canvas, brush] = [find(".pad canvas"), find(".brush")];
      const context = canvas.getContext("2d", { willReadFrequently: true });
      const { over, strength, init } = live.fields;
      let [last, at] = [null, { x: 0, y: 0 }];

      function clear() {
        context.fillStyle = "white";
        context.fillRect(0, 0, canvas.width, canvas.height);
      }

      // The engine takes a picture of the model's size. The link keeps it as PNG, in which nothing is lost.
      live.init = () => {
        if (!over.checked) return null;
        const { width, height } = canvas;
        return { rgba: context.getImageData(0, 0, width, height).data, width, height, strength: Number(strength.value) };
      };

      async function changed() {
        over.checked = true;
        init.value = canvas.toDataURL().split(",")[1];
        live.tell("written");
        live.remember();
        if (live.about) await autoencode();
      }

      async function autoencode() {
        try {
          await live.load();
          const { z, shape, picture: made } = await live.engine.ask("autoencode", live.init());
          picture(find(".made"), made);
          latent(find(".latent"), z, shape);
          find(".shape").textContent = `its latent, [${shape.join(" ")}]: blue is negative, red positive`;
        } catch (error) {
          live.fail(error);
        }
      }

      // --- painting ---

      function paint({ x, y }) {
        const side = Number(find(".width").value) * Math.max(1, canvas.width / 32);
        const from = last ?? { x, y };
        const steps = Math.max(1, Math.ceil(Math.hypot(x - from.x, y - from.y)));
        context.fillStyle = find(".colour").value;
        for (let k = 0; k <= steps; k++) {
          const [px, py] = [from.x + ((x - from.x) * k) / steps, from.y + ((y - from.y) * k) / steps];
          context.fillRect(Math.round(px - side / 2), Math.round(py - side / 2), Math.round(side), Math.round(side));
        }
        last = { x, y };
      }

      function pixel(event) {
        const box = canvas.getBoundingClientRect();
        const scale = canvas.width / box.width;
        return { x: (event.clientX - box.left) * scale, y: (event.clientY - box.top) * scale };
      }

      canvas.onpointerdown = (event) => {
        canvas.setPointerCapture(event.pointerId);
        paint(pixel(event));
      };
      canvas.onpointermove = (event) => last && paint(pixel(event));
      canvas.onpointerup = canvas.onpointercancel = () => {
        if (last) changed();
        last = null;
      };
      const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], " ": [0, 0] };
      canvas.onkeydown = (event) => {
        if (!(event.key in KEYS)) return;
        event.preventDefault();
        const [dx, dy] = KEYS[event.key];
        at = { x: Math.min(Math.max(at.x + dx, 0), canvas.width - 1), y: Math.min(Math.max(at.y + dy, 0), canvas.height - 1) };
        if (event.key === " ") paint({ x: at.x + 0.5, y: at.y + 0.5 }), (last = null), changed();
        mark();
      };
      function mark() {
        brush.hidden = document.activeElement !== canvas;
        Object.assign(brush.style, { left: `${(100 * at.x) / canvas.width}%`, top: `${(100 * at.y) / canvas.height}%` });
        brush.style.width = `${100 / canvas.width}%`;
      }
      canvas.onfocus = canvas.onblur = mark;

      // --- a file, cut to a square ---

      async function read(file) {
        try {
          const bitmap = await createImageBitmap(file);
          const side = Math.min(bitmap.width, bitmap.height);
          const [x, y] = [(bitmap.width - side) / 2, (bitmap.height - side) / 2];
          clear(); // what is transparent becomes white
          context.imageSmoothingQuality = "high";
          context.drawImage(bitmap, x, y, side, side, 0, 0, canvas.width, canvas.height);
          await changed();
        } catch {
          live.fail(new Error(`“${file.name}” is no picture that this browser can read: give a PNG, JPEG or WebP.`));
        }
      }

      element.ondragover = (event) => event.preventDefault();
      element.ondrop = (event) => {
        event.preventDefault();
        if (event.dataTransfer.files[0]) read(event.dataTransfer.files[0]);
      };
      find(".file").onchange = ({ target }) => target.files[0] && read(target.files[0]);
      find(".clear").onclick = () => {
        clear();
        over.checked = false;
        init.value = "";
        live.tell("written");
      };
      find(".go").onclick = async () => {
        over.checked = true;
        await live.draw();
        if (live.about) await autoencode();
      };

      // A link, or a model that has been loaded.
      async function restored() {
        if (!init.value || init.value === canvas.toDataURL().split(",")[1]) return;
        const image = Object.assign(new Image(), { src: `data:image/png;base64,${init.value}` });
        live.init_ready = image.decode().then(() => context.drawImage(image, 0, 0, canvas.width, canvas.height));
        await live.init_ready.catch(() => live.fail(new Error("The picture in this link is broken.")));
        element.open = true;
      }
      on(live, "configured", () => {
        const side = live.config.image_size ?? 512;
        if (canvas.width === side) return;
        Object.assign(canvas, { width: side, height: side });
        clear();
        restored();
      });
      on(live, "written", restored);
    },
  };

  // --- where this step is on the schedule --------------------------------------------------------------------------------------------

  const schedule = {
    name: "schedule",
    title: "Where is this step?",
    html: `
      <svg role="img" aria-label="How much of the picture and how much noise is left at each timestep"></svg>
      <p class="legend"><span class="signal">picture √ᾱ</span> <span class="noise">noise √(1−ᾱ)</span></p>
      <p class="says"></p>`,
    mount(live, element) {
      function show() {
        const T = live.schedule?.timesteps;
        const step = live.run?.steps[live.selected];
        if (!T || !step) return;
        const a = Array.from(live.schedule.alphas_cumprod);
        const mark = (t, name) => ({ x: t / (T - 1), y: Math.sqrt(a[t]), class: name });
        const visited = live.run.start.timesteps.map((t) => mark(t, "visited"));
        const curves = { signal: a.map(Math.sqrt), noise: a.map((a) => Math.sqrt(1 - a)) };
        curve(element.querySelector("svg"), curves, [...visited, mark(step.t, "current")]);
        const [signal, noise] = [Math.sqrt(a[step.t]), Math.sqrt(1 - a[step.t])].map((x) => x.toFixed(3));
        element.querySelector(".says").textContent =
          `At t = ${step.t} of ${T}: x_t = ${signal} · picture + ${noise} · noise. Drawing goes from right to left.`;
      }
      on(live, "select", show);
    },
  };

  // --- the same elsewhere -----------------------------------------------------------------------------------------------------------------

  const elsewhere = {
    name: "elsewhere",
    title: "The same picture elsewhere",
    html: `
      <p class="note"></p>
      <h3>Command line</h3><div class="copy"><pre><code class="command"></code></pre></div>
      <h3>Python</h3><div class="copy"><pre><code class="python"></code></pre></div>
      <h3>A link to this page, as it is now</h3><div class="copy"><pre><code class="link"></code></pre></div>
      <p><a class="button save" download="out.png">Save the picture</a> <a class="button given" download="picture.png" hidden>Save the picture it starts from</a></p>`,
    mount(live, element) {
      const find = (selector) => element.querySelector(selector);
      for (const box of element.querySelectorAll(".copy")) {
        const button = make("button", { type: "button", textContent: "Copy" });
        button.onclick = async () => {
          await copy(box.querySelector("code"));
          button.textContent = "Copied";
          setTimeout(() => (button.textContent = "Copy"), 1500);
        };
        box.append(button);
      }

      function show() {
        if (!live.request) return;
        const { prompt, negative = "", steps, guidance, sampler, seed, init, hide = [] } = live.request;
        const options = { model: live.name, negative, steps, guidance, sampler, seed, "num-images": 1 };
        const flags = Object.entries(init ? { strength: init.strength, ...options } : options);
        const given = flags.filter(([, value]) => value !== "").map(([name, value]) => `--${name}=${shell(value)}`);
        const command = init ? `img2img ${shell(prompt)} picture.png` : `txt2img ${shell(prompt)}`;
        find(".command").textContent = `minisd ${command} ${given.join(" ")}`;
        const float = (x) => (Number.isInteger(x) ? x.toFixed(1) : String(x));
        const named = [`steps=${steps}`, `guidance_scale=${float(guidance)}`, `sampler=${JSON.stringify(sampler)}`, `seed=${seed}`];
        if (negative) named.push(`negative_prompt=${JSON.stringify(negative)}`);
        const call = init ? `sd.img2img(${JSON.stringify(prompt)}, "picture.png", strength=${float(init.strength)}, ` : `sd.txt2img(${JSON.stringify(prompt)}, `;
        find(".python").textContent =
          `import minisd\n\nsd = minisd.load(${JSON.stringify(live.name)})\n` +
          `drawing = ${call}${named.join(", ")})\ndrawing.images[0].save("out.png")`;
        find(".link").textContent = live.link();
        find(".note").textContent = hide.length ? "These draw with all words: only this page switches words off." : "";
        const { picture: made } = live.run?.done ?? {};
        if (made) find(".save").href = address(made);
        find(".given").hidden = !init;
        if (init) find(".given").href = address(init);
      }

      function address(shown) {
        const canvas = document.createElement("canvas");
        picture(canvas, shown);
        return canvas.toDataURL();
      }

      // A page that is served without encryption has no clipboard, but may copy what is selected.
      async function copy(code) {
        if (navigator.clipboard) return navigator.clipboard.writeText(code.textContent);
        getSelection().selectAllChildren(code);
        document.execCommand("copy");
      }

      on(live, "start select done", show);
      live.form.addEventListener("change", show);
    },
  };

  // A word for the command line: as it is if it is plain, else in single quotes.
  const shell = (value) => (/^[\w./:-]+$/.test(value) ? value : `'${String(value).replaceAll("'", `'\\''`)}'`);

  return [attention, comparison, ablation, own, schedule, elsewhere];
})();
