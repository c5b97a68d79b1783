"use strict";
// Adds to the page's grid what changes: the selected step's timeline, the details of a decision, and the keyboard.
// The fragment holds the selection, so that an address can be passed on: #step=3&layer=12&zoom=4.
(() => {
  const { layerCount, pinned, steps } = JSON.parse(document.getElementById("data").textContent);
  const grid = document.getElementById("grid");
  const tip = document.getElementById("tip");
  if (!grid) return;
  const zoomInput = document.getElementById("zoom");
  const timeline = document.getElementById("timeline");
  const shown = { step: 1, layer: null, zoom: 1 }; // steps count from 1, layers from 0

  const columns = steps.map(() => []);
  const cells = new Map();
  for (const cell of grid.querySelectorAll("[data-step]")) {
    columns[cell.dataset.step - 1].push(cell);
    if (cell.tagName === "TD") cells.set(`${cell.dataset.step}/${cell.dataset.layer ?? ""}`, cell);
  }
  // A verification is one cell for all layers.
  const cellAt = (step, layer) => cells.get(`${step}/${layer}`) ?? cells.get(`${step}/`);

  const plain = (ns) => (ns / 1000).toLocaleString("en", { maximumFractionDigits: 1 });
  const micros = (ns) => `${plain(ns)} µs`;
  const period = (start, end) => `${plain(start)} – ${micros(end)} (${micros(end - start)})`;
  const number = (value) => (typeof value === "number" ? value.toFixed(3) : value);

  function details(step, layer) {
    const run = step.layers[layer];
    if (!run) {
      return [
        ["place in the output", step.position],
        ["tokens put out", step.tokens.join(", ")],
        ["drafts accepted", step.accepted ?? "unknown"],
        ["drafted from the text", step.fromText ?? "unknown"],
        ["took", micros(step.duration)],
      ];
    }
    const rows = [["token", step.tokens.join(", ")], ["place in the output", step.position], ["action", run.action]];
    if (step.verdict) rows.push(["draft", step.verdict]);
    for (const [action, score] of run.scores ?? []) rows.push([`score ${action}`, number(score)]);
    rows.push(["layer", period(run.start, run.end)]);
    if (run.decision) {
      const [start, end] = run.decision;
      rows.push(["decision", period(start, end)]);
      rows.push(["exposed", micros(run.exposed)]);
    } else {
      rows.push(["decision", pinned.includes(layer) ? "none: pinned" : "none: at full depth"]);
    }
    if (run.cost !== null) rows.push(["cost spent before", number(run.cost)]);
    return rows;
  }

  function make(name, attributes, text) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    return element;
  }

  function showTip(anchor, stepNumber, layer) {
    const step = steps[stepNumber - 1];
    const title = document.createElement("strong");
    title.textContent = `step ${stepNumber}, ` + (step.layers.length ? `layer ${layer}` : "verification");
    const table = document.createElement("table");
    for (const [label, value] of details(step, layer)) {
      const row = table.insertRow();
      row.appendChild(document.createElement("th")).textContent = label;
      row.insertCell().textContent = value;
    }
    tip.replaceChildren(title, table);
    tip.hidden = false;
    const box = anchor.getBoundingClientRect();
    const size = tip.getBoundingClientRect();
    const left = box.right + 10 + size.width < innerWidth ? box.right + 10 : box.left - 10 - size.width;
    tip.style.left = `${scrollX + Math.max(4, left)}px`;
    tip.style.top = `${scrollY + Math.max(4, Math.min(box.top, innerHeight - size.height - 4))}px`;
  }

  function nice(span, count) {
    const rough = span / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    return power * ([1, 2, 5].find((factor) => factor * power >= rough) ?? 10);
  }

  const POLICY = { y: 8, height: 26 };
  const DECODER = { y: 62, height: 40 };
  const AXIS = 108;

  function drawTimeline() {
    const step = steps[shown.step - 1];
    const span = Math.max(1, step.duration, ...step.layers.map((run) => run.end), ...step.evaluations.map((run) => run.end));
    const width = Math.max(300, timeline.clientWidth || 1200) * shown.zoom;
    const x = (ns) => (ns / span) * (width - 56) + 8;
    const svg = make("svg", { width, height: AXIS + 22, role: "img", "aria-labelledby": "step-title step-summary" });
    const block = (lane, start, end, attributes) => {
      const box = { x: x(start), y: lane.y, width: Math.max(1.5, x(end) - x(start)), height: lane.height, ...attributes };
      return svg.appendChild(make("rect", box));
    };

    const tick = nice(span, (width / 110) | 0);
    for (let ns = 0; ns <= span; ns += tick) {
      svg.append(make("line", { x1: x(ns), x2: x(ns), y1: 0, y2: AXIS }));
      svg.append(make("text", { x: x(ns) + 2, y: AXIS + 14 }, (ns / 1000).toLocaleString("en")));
    }
    step.layers.forEach((run, layer) => {
      const decided = run.decision ? "" : " undecided";
      const chosen = layer === shown.layer ? " chosen" : "";
      const attributes = { class: `block ${run.action}${decided}${chosen}`, "data-layer": layer };
      const box = block(DECODER, run.start, run.end, attributes);
      if (box.getAttribute("width") > 15) {
        const middle = x((run.start + run.end) / 2);
        svg.append(make("text", { x: middle, y: 86, class: `inside ${run.action}` }, layer));
      }
    });
    if (step.layers.length) {
      const last = step.layers.at(-1).end;
      if (step.duration > last) block(DECODER, last, step.duration, { class: "block head" });
    } else {
      block(DECODER, 0, step.duration, { class: "block verification", "data-layer": "" });
    }
    const decision = step.layers[shown.layer]?.decision;
    for (const { first, start, end, wait } of step.evaluations) {
      const chosen = decision && decision[0] === start && decision[1] === end ? " chosen" : "";
      block(POLICY, start, end, { class: `block evaluation${chosen}`, "data-layer": first });
      svg.append(
        make("line", { class: "link", x1: x(end), y1: POLICY.y + POLICY.height, x2: x(step.layers[first].start), y2: DECODER.y }),
      );
      if (wait[1] > wait[0]) block(DECODER, ...wait, { class: "exposed", "data-layer": first });
    }
    timeline.replaceChildren(svg);
  }

  function summary(step) {
    const began = `began ${(step.offset / 1e6).toFixed(2)} ms after the first`;
    const took = `took ${micros(step.duration)}`;
    if (!step.layers.length) return `${began}, ${took}: full depth over the drafted tokens, ${step.accepted ?? "?"} of which it accepted.`;
    if (!step.evaluations.length) return `${began}, ${took}. The policy decided nothing in it.`;
    const sum = (key) => step.evaluations.reduce((total, run) => total + run[key], 0);
    const policy = step.evaluations.reduce((total, run) => total + run.end - run.start, 0);
    const hidden = sum("hidden");
    const overlap = hidden ? `${micros(hidden)} of it while a layer ran` : "none of it while a layer ran (an inline lane)";
    const exposed = step.layers.reduce((total, run) => total + run.exposed, 0);
    return `${began}, ${took}. Policy time: ${micros(policy)}, ${overlap}; exposed: ${micros(exposed)}.`;
  }

  function show(step, layer = null) {
    for (const cell of columns[shown.step - 1]) cell.classList.remove("selected");
    cellAt(shown.step, shown.layer ?? 0).tabIndex = -1;
    shown.step = step;
    shown.layer = layer;
    for (const cell of columns[step - 1]) cell.classList.add("selected");
    const cell = cellAt(step, layer ?? 0);
    cell.tabIndex = 0;
    cell.setAttribute("aria-describedby", "tip");
    const { kind, tokens } = steps[step - 1];
    document.getElementById("step-title").textContent =
      `Step ${step} of ${steps.length}: ${kind}, ${tokens.length > 1 ? "tokens" : "token"} ${tokens.join(", ") || "none"}`;
    document.getElementById("step-summary").textContent = summary(steps[step - 1]);
    drawTimeline();
    const zoom = shown.zoom > 1 ? `&zoom=${shown.zoom}` : "";
    try {
      history.replaceState(null, "", `#step=${step}${layer === null ? "" : `&layer=${layer}`}${zoom}`);
    } catch {
      // A browser may refuse while an arrow key is held down; the next step sets the address again.
    }
  }

  function focus(step, layer) {
    show(step, layer);
    const cell = cellAt(step, layer);
    cell.focus({ preventScroll: true });
    cell.scrollIntoView({ block: "nearest", inline: "nearest" });
    showTip(cell, step, layer);
  }

  function followFragment() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    const whole = (key, low, high) => {
      const value = wanted.has(key) ? Number(wanted.get(key)) : NaN;
      return Number.isInteger(value) && value >= low && value <= high ? value : null;
    };
    const zoom = Number(wanted.get("zoom"));
    shown.zoom = zoom >= 1 && zoom <= 40 ? zoom : 1;
    zoomInput.value = shown.zoom;
    const step = whole("step", 1, steps.length) ?? 1;
    const layer = whole("layer", 0, layerCount - 1);
    if (layer === null) show(step);
    else focus(step, layer);
  }

  const place = (target) => {
    const cell = target.closest("[data-layer]");
    return cell && cell.dataset.layer !== "" ? Number(cell.dataset.layer) : 0;
  };

  grid.addEventListener("click", ({ target }) => {
    const cell = target.closest("[data-step]");
    if (!cell) return;
    if (cell.tagName === "TD") focus(Number(cell.dataset.step), place(cell));
    else show(Number(cell.dataset.step));
  });
  grid.addEventListener("mouseover", ({ target }) => {
    const cell = target.closest("td[data-step]");
    if (cell) showTip(cell, Number(cell.dataset.step), place(cell));
    else if (target.closest("th")) tip.hidden = true;
  });
  timeline.addEventListener("mouseover", ({ target }) => {
    if (target.closest("[data-layer]")) showTip(target, shown.step, place(target));
    else tip.hidden = true;
  });
  for (const area of [grid, timeline]) area.addEventListener("mouseleave", () => (tip.hidden = true));
  grid.addEventListener("focusout", () => (tip.hidden = true));
  grid.addEventListener("focusin", ({ target }) => {
    if (target.matches("td[data-step]")) showTip(target, Number(target.dataset.step), shown.layer ?? 0);
  });
  grid.addEventListener("keydown", (event) => {
    if (event.key === "Escape") tip.hidden = true;
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const far = { Home: 1, End: steps.length };
    if (event.altKey || event.ctrlKey || event.metaKey || !(event.key in moves || event.key in far)) return;
    event.preventDefault();
    const [across, down] = moves[event.key] ?? [0, 0];
    const clamp = (value, low, high) => Math.max(low, Math.min(high, value));
    const step = far[event.key] ?? clamp(shown.step + across, 1, steps.length);
    focus(step, clamp((shown.layer ?? 0) + down, 0, layerCount - 1));
  });
  zoomInput.addEventListener("input", () => {
    const middle = (timeline.scrollLeft + timeline.clientWidth / 2) / shown.zoom;
    shown.zoom = Number(zoomInput.value);
    show(shown.step, shown.layer);
    timeline.scrollLeft = middle * shown.zoom - timeline.clientWidth / 2;
  });
  addEventListener("resize", drawTimeline);
  addEventListener("hashchange", followFragment);
  followFragment();
})();
