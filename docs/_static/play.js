// The page `play`: which frame of which sheet is shown, and where the pixels look. The data are those of draw_play.py.
"use strict";

(() => {
  const SIDE = 32; // pixels of a picture
  const CELL = 8; // of them, under one of the 4x4 pixels that look at words
  const here = document.currentScript.src;
  const steps = PLAY.timesteps.length;
  const find = (name) => document.getElementById(`play-${name}`);
  const [prompt, step, scale, run, chips, says] = ["prompt", "step", "scale", "run", "words", "says"].map(find);
  const canvases = [find("x-t"), find("x-0")];

  let drawing, sheet, maps;
  let pinned = null; // the word that was clicked: its place in drawing.words
  let shown = null; // the one that is pointed at, or else the pinned one
  let film = null; // the timer, while it runs

  // Bytes in the order [scale, step, word, 4x4]; 255 stands for the word's largest weight on any of the sliders' places.
  function looks(word) {
    const frame = Number(scale.value) * steps + Number(step.value) - 1;
    const start = (frame * drawing.words.length + word) * 16;
    return Array.from(maps.subarray(start, start + 16), (byte) => byte / 255);
  }

  function show() {
    if (!sheet) return; // the first is still on its way
    const column = step.value - 1;
    const t = PLAY.timesteps[column];
    const s = PLAY.scales[scale.value];
    canvases.forEach((canvas, row) => {
      const from = [column * SIDE, (2 * scale.value + row) * SIDE, SIDE, SIDE];
      canvas.getContext("2d").drawImage(sheet, ...from, 0, 0, SIDE, SIDE);
    });
    find("step-value").textContent = `${step.value} of ${steps}, t = ${t}`;
    find("scale-value").textContent = `s = ${s}`;
    scale.setAttribute("aria-valuetext", s);
    step.setAttribute("aria-valuetext", `${step.value} of ${steps}`);
    for (const chip of chips.children) {
      chip.setAttribute("aria-pressed", chip.value === String(pinned));
      chip.classList.toggle("shown", chip.value === String(shown));
    }
    if (shown === null) {
      says.textContent = "Point at a word, tap it, or reach it with the Tab key: where do the pixels look at it?";
      return;
    }
    // A veil: the less a pixel looks at the word, the darker.
    const looking = looks(shown);
    const context = canvases[1].getContext("2d");
    looking.forEach((look, i) => {
      context.fillStyle = `rgb(0 0 0 / ${0.85 * (1 - look)})`;
      context.fillRect(CELL * (i % 4), CELL * Math.floor(i / 4), CELL, CELL);
    });
    const peak = drawing.peaks[shown];
    const share = (100 * peak * looking.reduce((a, b) => a + b)) / 16;
    const most = peak * Math.max(...looking);
    says.textContent =
      `“${drawing.words[shown]}” gets ${share.toFixed(1)} % of all looks at this step; ` +
      `the brightest square gives it a weight of ${most.toFixed(2)}.`;
  }

  function makeChip(word, place) {
    const chip = document.createElement("button");
    chip.type = "button";
    chip.value = place;
    chip.textContent = word;
    const look = (at) => () => {
      shown = at === null ? pinned : at;
      show();
    };
    chip.addEventListener("pointerenter", look(place));
    chip.addEventListener("pointerleave", look(null));
    chip.addEventListener("focus", look(place));
    chip.addEventListener("blur", look(null));
    chip.addEventListener("click", () => {
      pinned = pinned === place ? null : place;
      shown = pinned;
      show();
    });
    return chip;
  }

  // All at once, when the sheet has arrived: until then, the prompt before stays.
  async function choose() {
    const chosen = PLAY.drawings[prompt.value];
    const next = new Image();
    next.src = new URL(chosen.sheet, here);
    await next.decode();
    if (chosen !== PLAY.drawings[prompt.value]) return; // another was chosen meanwhile
    drawing = chosen;
    sheet = next;
    maps = Uint8Array.from(atob(drawing.maps), (letter) => letter.charCodeAt(0));
    pinned = shown = null;
    chips.replaceChildren(...drawing.words.map(makeChip));
    show();
  }

  function stop() {
    clearInterval(film);
    film = null;
    run.textContent = "Play";
  }

  function play() {
    if (film) return stop();
    if (+step.value === steps) step.value = 1;
    run.textContent = "Stop";
    film = setInterval(() => {
      step.value = +step.value + 1;
      show();
      if (+step.value === steps) stop();
    }, 160);
  }

  PLAY.drawings.forEach(({ prompt: text }, i) => prompt.add(new Option(text, i)));
  step.max = step.value = steps;
  scale.max = PLAY.scales.length - 1;
  scale.value = PLAY.scales.indexOf(4);
  prompt.addEventListener("change", choose);
  step.addEventListener("input", () => (stop(), show()));
  scale.addEventListener("input", show);
  run.addEventListener("click", play);
  choose();
})();
