// What unfolds below the pictures. Each panel: {name, title, html, mount}. `mount(live, element)` gives it its life, by
// the fields and events of MinisdPage, as the tour does.
globalThis.minisdPanels = (() => {
  const { picture, latent, map, curve } = minisdFigures;
  const on = (live, names, f) => names.split(" ").forEach((name) => live.addEventListener(name, f));

  // A button with a picture and a caption, which stays text whatever is in it.
  function tile(caption, onclick) {
    const [button, span] = [document.createElement("button"), document.createElement("span")];
    Object.assign(button, { type: "button", onclick });
    span.textContent = caption;
    button.append(document.createElement("canvas"), span);
    return button;
  }

  // The places of a prompt's tokens: one for each token up to <end>, and one for all padding together.
  function places({ pieces }) {
    const end = pieces.indexOf("<end>");
    const all = pieces.slice(0, end + 1).map((text, i) => ({ text, at: [i] }));
    const padding = pieces.map((_, i) => i).slice(end + 1);
    return padding.length ? [...all, { text: "<pad>", at: padding }] : all;
  }

  // --- attention by word ---------------------------------------------------------------------------------------------

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
      <p>Bright pixels read that word at this step. Point at a word to see it over the large picture. A click holds it.</p>
      <div class="words" role="group" aria-label="The tokens of the prompt"></div>
      <div class="tools"><label>Layer of the UNet <select name="layer"></select></label></div>
      <p class="says" aria-live="polite"></p>`,
    mount(live, element) {
      const [words, says] = [".words", ".says"].map((selector) => element.querySelector(selector));
      const { layer, word: held } = live.fields; // held: the place among the words of the one that was clicked, or ""
      let pointed = null;

      function word({ text, at }, place) {
        const point = (to) => () => veil((pointed = to));
        const button = tile(text, () => veil((held.value = held.value === String(place) ? "" : place)));
        Object.assign(button, { at, onpointerenter: point(place), onfocus: point(place) });
        button.onpointerleave = button.onblur = point(null);
        button.classList.toggle("off", at.every((i) => live.request.hide?.includes(i)));
        return button;
      }

      function listLayers(maps) {
        const names = Object.keys(maps);
        if (layer.options.length === names.length + 1 && layer.options[1]?.value === names[0]) return;
        const option = (name) => new Option(`${name.split(".transformer")[0]} (${maps[name].w}×${maps[name].h})`, name);
        layer.replaceChildren(new Option("all, their mean", ""), ...names.map(option));
        layer.value = live.wanted.layer ?? "";
      }

      // A word's largest weight in this drawing so far is shown bright, so that its steps can be compared.
      function show() {
        const { steps } = live.run;
        listLayers(steps[0].attention);
        for (const button of words.children) {
          const peaks = steps.map((step) => Math.max(...reading(step, layer.value, button.at).values));
          button.most = Math.max(...peaks);
          button.now = reading(steps[live.selected], layer.value, button.at);
          draw(button.firstChild, button);
        }
        veil();
      }

      const draw = (canvas, { now: { values, w, h }, most }) =>
        map(canvas, values, w, h, { over: live.shown.x0, most });

      function veil() {
        const place = pointed ?? (held.value && Number(held.value));
        [...words.children].forEach((button, i) => button.setAttribute("aria-pressed", held.value === String(i)));
        const canvas = live.find(".pictures figure:last-child canvas");
        const button = words.children[place];
        says.textContent = "";
        if (!button?.now) return live.shown && picture(canvas, live.shown.x0);
        draw(canvas, button);
        const { values } = button.now;
        const [share, most] = [values.reduce((a, b) => a + b) / values.length, Math.max(...values)];
        says.textContent =
          `“${button.textContent}” gets ${(100 * share).toFixed(1)} % of all reading at this step. ` +
          `The pixel that reads it most gives it ${(100 * most).toFixed(0)} %.`;
      }

      on(live, "start", () => words.replaceChildren(...places(live.run.start.tokens).map(word)));
      on(live, "select", show);
      layer.onchange = show;
    },
  };

  // --- two prompts from the same noise -------------------------------------------------------------------------------

  // The words of a text, those marked that stand between what both texts begin and end with.
  function marked(text, other) {
    const [words, others] = [text.split(/\s+/), other.split(/\s+/)];
    const most = Math.min(words.length, others.length);
    let [from, back] = [0, 0];
    while (from < most && words[from] === others[from]) from++;
    while (back < most - from && words.at(-1 - back) === others.at(-1 - back)) back++;
    return words.flatMap((word, i) => {
      const element = document.createElement(i < from || i >= words.length - back ? "span" : "mark");
      element.textContent = word;
      return [element, " "];
    });
  }

  const comparison = {
    name: "comparison",
    title: "Change one word",
    html: `
      <p>A second prompt, drawn from the same noise. At which step do the two part?</p>
      <div class="ask">
        <input name="second" type="text" aria-label="Second prompt" autocomplete="off" spellcheck="false" />
        <button>Draw both</button>
      </div>
      <div class="pair" hidden>
        <figure><canvas role="img"></canvas><figcaption></figcaption></figure>
        <figure><canvas role="img"></canvas><figcaption></figcaption></figure>
      </div>`,
    mount(live, element) {
      const [pair, { second, prompt }] = [element.querySelector(".pair"), live.fields];
      element.ontoggle = () => (second.value ||= prompt.value);

      async function show() {
        const { run, other } = live;
        pair.hidden = !other?.steps.length;
        if (pair.hidden) return;
        const at = Math.min(live.selected, other.steps.length - 1);
        const texts = [run.request.prompt, other.request.prompt];
        for (const [k, { x0 }] of (await Promise.all([live.pictures(run, at), live.pictures(other, at)])).entries()) {
          const [canvas, caption] = pair.children[k].children;
          caption.replaceChildren(...marked(texts[k], texts[1 - k]));
          picture(canvas, x0);
          canvas.setAttribute("aria-label", `${texts[k]}, step ${at + 1}`);
        }
      }

      on(live, "start select other", show);
    },
  };

  // --- words switched off --------------------------------------------------------------------------------------------

  const ablation = {
    name: "ablation",
    title: "Switch words off",
    html: `
      <p>
        The same drawing from the same noise, but no pixel may read that token. Which one carries the picture? CLIP has
        read the whole sentence before, so each token also knows of those before it.
      </p>
      <div class="tools">
        <button type="button" class="each">Draw without each token</button>
        <button type="button" class="restore" hidden>Switch all tokens on</button>
      </div>
      <div class="gallery"></div>`,
    mount(live, element) {
      const [gallery, restore] = [element.querySelector(".gallery"), element.querySelector(".restore")];
      restore.onclick = () => live.draw({ hide: [] });
      on(live, "start written", () => (restore.hidden = !live.hidden().length));

      const card = (caption, hide) => Object.assign(tile(caption, () => live.draw({ hide })), { hide });

      async function drawEach(wanted) {
        const request = { ...(await live.read()), preview: 0, attention: false };
        const all = places(await live.engine.ask("tokenize", { prompt: request.prompt }));
        const others = all.filter(({ text }) => text !== "<end>").flatMap(({ at }) => at);
        const each = all.slice(1).map(({ text, at }) => card(`without “${text}”`, at)); // all but <start>
        gallery.replaceChildren(card("all tokens", []), ...each, card("only <end>", others));
        for (const button of gallery.children) {
          live.say(`Drawing: ${button.textContent}`);
          const done = await live.engine.draw({ ...request, hide: button.hide });
          if (!done || !wanted()) return;
          picture(button.firstChild, done.picture);
        }
        live.say("Choose one of these pictures to see its steps.");
      }
      element.querySelector(".each").onclick = () => live.work(drawEach);
    },
  };

  // --- a picture of one's own ----------------------------------------------------------------------------------------

  const own = {
    name: "own",
    title: "Start from a picture of yours",
    html: `
      <p>Draw with the mouse or a finger, or drop a picture here. It does not leave your device.</p>
      <div class="pair drawn">
        <figure>
          <canvas class="pad" role="img" aria-label="Your picture"></canvas>
          <figcaption>your picture</figcaption>
          <div class="tools">
            <button type="button" class="choose">Choose a picture</button>
            <button type="button" class="clear">Clear</button>
            <input type="file" class="file" accept="image/*" aria-label="Your picture" hidden />
            <label>Colour <input type="color" class="colour" value="#e8590c" /></label>
            <label>Brush <input type="range" class="width" min="1" max="8" value="3" /></label>
          </div>
        </figure>
        <figure>
          <canvas class="made" role="img" aria-label="What the autoencoder makes of it"></canvas>
          <figcaption>what the autoencoder makes of it</figcaption>
          <canvas class="latent" role="img" aria-label="The latent, its channels side by side"></canvas>
          <figcaption class="shape"></figcaption>
        </figure>
      </div>
      <div class="tools">
        <label><input type="checkbox" name="over" value="1" /> Start from this picture</label>
        <label>Strength <input type="range" name="strength" min="0.05" max="1" step="0.05" value="0.7" /></label>
        <button type="button" class="go">Draw over it</button>
      </div>`,
    mount(live, element) {
      const find = (selector) => element.querySelector(selector);
      const [pad, file, { over, strength, init }] = [find(".pad"), find(".file"), live.fields];
      const context = pad.getContext("2d", { willReadFrequently: true });
      let restored = null; // a promise: the picture of a link has been drawn on the pad

      function clear() {
        context.fillStyle = "white";
        context.fillRect(0, 0, pad.width, pad.height);
      }

      // The engine takes a picture of the model's size.
      live.init = async () => {
        await restored;
        const [{ width, height }, { data: rgba }] = [pad, context.getImageData(0, 0, pad.width, pad.height)];
        return over.checked ? { rgba, width, height, strength: Number(strength.value) } : null;
      };

      // The link holds the picture as PNG, in which nothing is lost.
      const png = () => pad.toDataURL().split(",")[1];

      async function changed() {
        [over.checked, init.value] = [true, png()];
        live.remember();
        live.tell("written");
        if (live.about) await autoencode();
      }

      async function autoencode() {
        const { z, shape, picture: made } = await live.engine.ask("autoencode", await live.init());
        picture(find(".made"), made);
        latent(find(".latent"), z, shape);
        find(".shape").textContent = `its latent [${shape.join(" ")}]: blue is negative, red is positive`;
      }

      find(".go").onclick = () => live.draw({ over: true });
      on(live, "ready", () => over.checked && autoencode());

      // --- painting: a line of squares from where the pointer was

      let last = null;
      function paint({ offsetX, offsetY }) {
        const scale = pad.width / pad.clientWidth;
        const [x, y, side] = [offsetX * scale, offsetY * scale, Math.ceil((find(".width").value * pad.width) / 32)];
        const [from, count] = [last ?? { x, y }, last ? Math.ceil(Math.hypot(x - last.x, y - last.y)) : 1];
        context.fillStyle = find(".colour").value;
        for (let k = 1; k <= count; k++) {
          const [left, top] = [from.x + ((x - from.x) * k) / count, from.y + ((y - from.y) * k) / count];
          context.fillRect(Math.round(left - side / 2), Math.round(top - side / 2), side, side);
        }
        last = { x, y };
      }

      pad.onpointerdown = (event) => {
        pad.setPointerCapture(event.pointerId);
        paint(event);
      };
      pad.onpointermove = (event) => last && paint(event);
      pad.onpointerup = pad.onpointercancel = () => {
        if (last) changed();
        last = null;
      };

      // --- a file, cut to a square. What is transparent becomes white.

      async function take(picked) {
        if (!picked) return;
        try {
          const image = await createImageBitmap(picked);
          const side = Math.min(image.width, image.height);
          clear();
          context.imageSmoothingQuality = "high";
          const from = [(image.width - side) / 2, (image.height - side) / 2, side, side];
          context.drawImage(image, ...from, 0, 0, pad.width, pad.height);
          await changed();
        } catch {
          live.fail(new Error(`“${picked.name}” is no picture that this browser can read: give a PNG, JPEG or WebP.`));
        }
      }

      element.ondragover = (event) => event.preventDefault();
      element.ondrop = (event) => {
        event.preventDefault();
        take(event.dataTransfer.files[0]);
      };
      find(".choose").onclick = () => file.click();
      file.onchange = () => take(file.files[0]);
      find(".clear").onclick = () => {
        clear();
        [over.checked, init.value] = [false, ""];
      };

      async function restore() {
        if (!init.value || init.value === png()) return;
        const image = Object.assign(new Image(), { src: `data:image/png;base64,${init.value}` });
        await image.decode().catch(() => live.fail(new Error("The picture in this link is damaged.")));
        context.drawImage(image, 0, 0, pad.width, pad.height);
        element.open = true;
      }

      on(live, "configured", () => {
        if (pad.width === live.config.image_size) return;
        pad.width = pad.height = live.config.image_size ?? 512;
        clear();
        restored = restore();
      });
      on(live, "written", () => (restored = restore()));
    },
  };

  // --- where this step is on the schedule ----------------------------------------------------------------------------

  const schedule = {
    name: "schedule",
    title: "Where is this step?",
    html: `
      <svg role="img" aria-label="How much of the picture, and how much noise, is in x_t at each timestep"></svg>
      <p><span class="signal">picture √ᾱ</span> · <span class="noise">noise √(1−ᾱ)</span></p>
      <p class="says"></p>`,
    mount(live, element) {
      function show() {
        const { alphas_cumprod, timesteps: T } = live.schedule;
        const parts = [Array.from(alphas_cumprod, Math.sqrt), Array.from(alphas_cumprod, (a) => Math.sqrt(1 - a))];
        const mark = (t, name) => ({ x: t / (T - 1), y: parts[0][t], class: name });
        const { t } = live.run.steps[live.selected];
        const marks = live.run.start.timesteps.map((t) => mark(t, "visited"));
        marks.push({ ...mark(t, "current"), r: 1.6 });
        curve(element.querySelector("svg"), { signal: parts[0], noise: parts[1] }, marks);
        const [signal, noise] = parts.map((part) => part[t].toFixed(3));
        element.querySelector(".says").textContent =
          `t = ${t} of ${T}: x_t = ${signal} · picture + ${noise} · noise. Drawing goes from right to left.`;
      }
      on(live, "select", show);
    },
  };

  // --- the same picture elsewhere ------------------------------------------------------------------------------------

  // A word for the command line: as it is if it is plain, else in single quotes.
  const shell = (value) => (/^[\w./:-]+$/.test(value) ? value : `'${String(value).replaceAll("'", `'\\''`)}'`);
  // Python's text and floating-point number.
  const text = JSON.stringify;
  const float = (x) => (Number.isInteger(x) ? x.toFixed(1) : String(x));

  const elsewhere = {
    name: "elsewhere",
    title: "The same picture elsewhere",
    html: `
      <p class="note" hidden>These draw with all tokens, because only this page can switch them off.</p>
      <h3>Command line</h3><div class="copy"><pre><code></code></pre><button type="button">Copy</button></div>
      <h3>Python</h3><div class="copy"><pre><code></code></pre><button type="button">Copy</button></div>
      <h3>A link to this page as it is now</h3>
      <div class="copy"><pre><code></code></pre><button type="button">Copy</button></div>
      <p>
        <a class="save" download="out.png">Save the picture</a>
        <a class="given" download="picture.png" hidden>Save the picture that it starts from</a>
      </p>`,
    mount(live, element) {
      const find = (selector) => element.querySelector(selector);

      function show() {
        if (!live.request) return;
        const { prompt, negative, steps, guidance, sampler, seed, init, hide } = live.request;
        const flags = { model: live.name, negative, steps, guidance, sampler, seed, strength: init?.strength };
        const given = Object.entries(flags).filter(([, value]) => value || value === 0);
        const words = [...given.map(([name, value]) => `--${name} ${shell(value)}`), "--num-images 1"];
        const positional = [shell(prompt), ...(init ? ["picture.png"] : [])];
        // A prompt that begins with a dash would be taken for a flag, unless it stands behind "--".
        const all = prompt.startsWith("-") ? [...words, "--", ...positional] : [...positional, ...words];
        const command = init ? "img2img" : "txt2img";
        const options = [
          ...(init ? [`"picture.png"`, `strength=${float(init.strength)}`] : []),
          ...(negative ? [`negative_prompt=${text(negative)}`] : []),
          `steps=${steps}, guidance_scale=${float(guidance)}, sampler=${text(sampler)}, seed=${seed}`,
        ];
        const lines = [
          `import minisd\n\nsd = minisd.load(${text(live.name)})`,
          `drawing = sd.${command}(${[text(prompt), ...options].join(", ")})`,
          `drawing.images[0].save("out.png")`,
        ];
        const texts = [`minisd ${command} ${all.join(" ")}`, lines.join("\n"), live.link()];
        element.querySelectorAll("code").forEach((code, k) => (code.textContent = texts[k]));
        find(".note").hidden = !hide?.length;
        find(".given").hidden = !init;
        if (init) find(".given").href = address(init);
        if (live.run.done) find(".save").href = address(live.run.done.picture);
      }

      function address(shown) {
        const canvas = document.createElement("canvas");
        picture(canvas, shown);
        return canvas.toDataURL();
      }

      // By the selection, because the newer way does not exist where a page is served without encryption.
      function copy({ target }) {
        getSelection().selectAllChildren(target.parentElement.querySelector("code"));
        target.textContent = document.execCommand("copy") ? "Copied" : "Press Ctrl+C";
      }
      element.querySelectorAll(".copy button").forEach((button) => (button.onclick = copy));

      on(live, "start select done written", show);
      live.form.addEventListener("change", show);
    },
  };

  return [attention, comparison, ablation, own, schedule, elsewhere];
})();
