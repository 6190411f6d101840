
"use strict";
// The explorer. Data comes from the JSON block; text enters the page through textContent alone.
(() => {
  const articles = JSON.parse(document.getElementById("data").textContent);
  if (!articles.length) return;
  const byId = (id) => document.getElementById(id);
  const [explorer, articleList, rowList] = ["explorer", "article", "trajectory"].map(byId);
  const state = { article: 0, row: 0, step: 0 };
  const SVG = "http://www.w3.org/2000/svg";

  function add(parent, name, attributes = {}, text = "") {
    const made = parent instanceof SVGElement || name === "svg"
      ? document.createElementNS(SVG, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== "") made.textContent = text;
    return parent.appendChild(made);
  }
  const number = (value, digits = 2, sign = true) => value === null ? "–"
    : (value < 0 ? "−" : sign ? "+" : "") + Math.abs(value).toFixed(digits);
  const probability = (p) => p === null ? "read" : p < 0.001 ? "< 0.001" : p.toFixed(3);
  const mean = (values) => {
    const known = values.filter((v) => v !== null);
    return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
  };
  const letter = (subject) => subject === null ? "" : subject < 26 ? String.fromCharCode(65 + subject) : String(subject);
  function shade(gain) {
    if (gain === null || Math.abs(gain) < 0.15) return "u0";
    return (gain > 0 ? "u" : "d") + Math.min(5, Math.ceil(Math.abs(gain) / 0.6));
  }
  const caption = () => `likeliest keys for the query of step ${state.step + 1}`;
  const where = (a) => a.phase === "evaluation" ? "evaluation" : `training, update ${a.update}`;
  const shown = () => {
    const rows = articles[state.article].rows;
    return [rows[state.row], ...rows.filter((row, i) => i !== state.row).slice(0, 1)];
  };

  // -- lists ---------------------------------------------------------------------------------------------------

  function fillArticles() {
    let group = null, label = "";
    articles.forEach((article, i) => {
      if (where(article) !== label) group = add(articleList, "optgroup", { label: label = where(article) });
      const rewards = article.rows.map((row) => `${row.name} ${number(mean(row.rewards))}`).join(", ");
      add(group, "option", { value: i }, `${article.index + 1}. ${article.title} (${rewards})`);
    });
  }
  function fillRows() {
    rowList.replaceChildren();
    articles[state.article].rows.forEach((row, i) =>
      add(rowList, "option", { value: i }, row.name + (row.kept ? "" : " (not kept)")));
    rowList.value = state.row;
  }

  // -- drawings ------------------------------------------------------------------------------------------------

  function geometry(width, article, row, widest = 26) {
    const left = 24, count = article.keys.length;
    const cell = Math.max(7, Math.min(widest, Math.floor((width - left) / count)));
    return { left, count, cell, steps: row.picks.length, width: left + cell * count };
  }
  function subjects(svg, g, article, y) {
    if (g.cell >= 9) article.subjects.forEach((s, j) =>
      add(svg, "text", { x: g.left + (j + 0.5) * g.cell, y, class: "tick middle" }, letter(s)));
    add(svg, "text", { x: g.left, y: y + 16, class: "tick" }, "pairs in article order →");
  }
  function drawOrder() {
    const article = articles[state.article], rows = shown(), target = byId("order");
    const line = 14, g = geometry(target.clientWidth - 90, article, rows[0], 36);
    const height = Math.max(...rows.map((row) => row.picks.length)) * line;
    const svg = document.createElementNS(SVG, "svg");
    const spoken = rows.map((row) => `${row.name} reads pairs ${row.picks.map((p) => p + 1).join(", ")}`).join("; ");
    for (const [key, value] of Object.entries(
      { width: g.width + 90, height: height + 32, role: "img", "aria-label": spoken, class: "heat" })) {
      svg.setAttribute(key, value);
    }
    add(svg, "rect", { x: g.left, y: 0, width: g.cell * g.count, height, class: "ground" });
    for (const t of [0, rows[0].picks.length - 1]) {
      add(svg, "text", { x: g.left - 6, y: t * line + 11, class: "tick end" }, String(t + 1));
    }
    const ends = [];
    [...rows.entries()].reverse().forEach(([i, row]) => {
      const kind = i ? "untrained" : "trained";
      const at = row.picks.map((pick, t) => [g.left + (pick + 0.5) * g.cell, (t + 0.5) * line]);
      add(svg, "polyline", { points: at.map((p) => p.join(",")).join(" "), class: `line ${kind}` });
      at.forEach(([cx, cy], t) => add(svg, "circle", {
        cx, cy, r: 2.5, class: `dot ${kind}`, "data-step": t, "data-row": i }));
      ends.push([...at[at.length - 1], row.name, kind]);
    });
    const near = ends.length > 1 && Math.abs(ends[0][0] - ends[1][0]) < 80;
    ends.forEach(([x, y, name, kind], i) =>
      add(svg, "text", { x: x + 9, y: y + (near && !i ? -10 : 4), class: `name ${kind}` }, name));
    subjects(svg, g, article, height + 11);
    target.replaceChildren(svg);
  }
  function drawMap(target, article, row, reading) {
    const line = 18, g = geometry(target.clientWidth, article, row), height = g.steps * line;
    const order = row.picks.map((p) => p + 1).join(", ");
    const svg = add(target, "svg", { width: g.width, height: height + 30, role: "img", class: "heat",
      "aria-label": `Attention of ${g.steps} steps over ${g.count} keys; read in the order ${order}` });
    add(svg, "rect", { x: g.left, y: 0, width: g.cell * g.count - 1, height: height - 1, class: "ground" });
    row.probs.forEach((step, t) => {
      add(svg, "text", { x: g.left - 6, y: t * line + 13, class: "tick end", "data-step": t }, String(t + 1));
      step.forEach((p, j) => {
        if (p !== null && p < 0.0005) return;
        const place = { x: g.left + j * g.cell, y: t * line, width: g.cell - 1, height: line - 1 };
        add(svg, "rect", p === null ? { ...place, class: "cell read" }
          : { ...place, class: "cell", "fill-opacity": Math.sqrt(p).toFixed(2) });
      });
      add(svg, "circle", { cx: g.left + row.picks[t] * g.cell + (g.cell - 1) / 2, cy: t * line + (line - 1) / 2,
        r: Math.min(4, g.cell / 2 - 1), class: "pick" });
    });
    subjects(svg, g, article, height + 11);
    add(svg, "rect", { x: g.left - 1, width: g.cell * g.count + 1, height: line + 1, class: "now" });
    const top = add(svg, "rect", { x: 0, y: 0, width: g.width, height, class: "target" });
    const under = (event) => {
      const box = top.getBoundingClientRect();
      const j = Math.floor((event.clientX - box.left - g.left) / g.cell);
      return [Math.max(0, Math.min(g.steps - 1, Math.floor((event.clientY - box.top) / line))), j];
    };
    top.addEventListener("click", (event) => go(under(event)[0]));
    top.addEventListener("pointermove", (event) => {
      const [t, j] = under(event);
      if (j >= 0 && j < g.count) reading.textContent = `step ${t + 1}, ${probability(row.probs[t][j])}: ${article.keys[j]}`;
    });
    top.addEventListener("pointerleave", () => { reading.textContent = caption(); });
  }

  // -- panels --------------------------------------------------------------------------------------------------

  function drawPanel(row, i) {
    const article = articles[state.article];
    const panel = add(byId("panels"), "div", { class: `panel ${i ? "second" : "first"}` });
    const title = add(panel, "h3");
    add(title, "b", {}, row.name + (row.kept ? "" : " (not kept by the filter)"));
    add(title, "span", {}, `reward ${number(mean(row.rewards))}`);
    add(panel, "div", { class: "scroll map", role: "region", "aria-label": `Attention, ${row.name}`, tabindex: 0 });
    add(panel, "p", { class: "reading" });
    add(panel, "ul", { class: "keys", "aria-label": `Likeliest keys at this step, ${row.name}` });
    const list = add(panel, "ol", { class: "steps", "aria-label": `Steps, ${row.name}` });
    row.queries.forEach((query, t) => {
      const button = add(add(list, "li"), "button", { type: "button", class: "step", "data-step": t });
      add(add(button, "span", { class: "query" }), "bdi", {}, query || "(blank)");
      add(button, "span", { class: "reward" }, number(row.rewards[t]));
      const read = add(button, "span", { class: "read" });
      add(read, "span", { class: "quiet" }, "read ");
      add(read, "bdi", { class: "key" }, article.keys[row.picks[t]]);
      const value = add(button, "bdi", { class: "value" });
      row.values[t].tokens.forEach((token, k) => {
        const gain = row.values[t].gains[k];
        add(value, "span", { class: shade(gain), title: `${number(gain)} nats` }, token);
      });
      button.addEventListener("click", () => go(t));
    });
  }
  function showKeys(panel, row) {
    const list = panel.querySelector(".keys"), article = articles[state.article];
    list.replaceChildren();
    const probs = row.probs[state.step], pick = row.picks[state.step];
    if (!probs) return;
    const best = probs.map((p, j) => [p, j]).filter(([p]) => p !== null).sort((a, b) => b[0] - a[0]).slice(0, 4);
    if (!best.some(([, j]) => j === pick)) best.push([probs[pick], pick]);
    for (const [p, j] of best) {
      const item = add(list, "li", { class: j === pick ? "picked" : "" });
      add(item, "span", { "aria-label": j === pick ? "drawn" : "" }, j === pick ? "→" : "");
      add(item, "span", { class: "p" }, probability(p));
      add(add(item, "span"), "div", { class: "bar" }).style.width = `${Math.max(2, (p ?? 0) * 100)}%`;
      add(item, "bdi", {}, article.keys[j]);
    }
  }

  // -- what is shown now ---------------------------------------------------------------------------------------

  function show() {
    const rows = shown(), last = rows[0].picks.length - 1;
    byId("place").textContent = `step ${state.step + 1} of ${last + 1}`;
    byId("previous").disabled = state.step === 0;
    byId("next").disabled = state.step === last;
    document.querySelectorAll("#panels .panel").forEach((panel, i) => {
      showKeys(panel, rows[i]);
      panel.querySelector(".reading").textContent = caption();
      panel.querySelector(".now").setAttribute("y", state.step * 18 - 1);
      panel.querySelectorAll("[data-step]").forEach((part) => {
        const here = Number(part.dataset.step) === state.step;
        if (part instanceof SVGElement) part.classList.toggle("here", here);
        else {
          part.tabIndex = here ? 0 : -1;
          if (here) part.setAttribute("aria-current", "step"); else part.removeAttribute("aria-current");
        }
      });
    });
    document.querySelectorAll("#order circle").forEach((dot) =>
      dot.setAttribute("r", Number(dot.dataset.step) === state.step ? 4 + 2 * Number(dot.dataset.row) : 2.5));
  }
  function go(step, focusFrom = null) {
    state.step = Math.max(0, Math.min(shown()[0].picks.length - 1, step));
    show();
    if (focusFrom) focusFrom.querySelector('[aria-current="step"]').focus();
  }
  function draw() {
    byId("panels").replaceChildren();
    drawOrder();
    const rows = shown();
    rows.forEach(drawPanel);
    document.querySelectorAll("#panels .panel").forEach((panel, i) =>
      drawMap(panel.querySelector(".map"), articles[state.article], rows[i], panel.querySelector(".reading")));
    show();
  }
  function choose(article, row) {
    Object.assign(state, { article, row, step: 0 });
    fillRows();
    draw();
  }

  const KEYS = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1 };
  explorer.addEventListener("keydown", (event) => {
    if (event.target.matches("select") || event.altKey || event.ctrlKey || event.metaKey) return;
    const list = event.target.closest(".steps");
    if (!(event.key in KEYS) || (event.key.endsWith("Up") || event.key.endsWith("Down")) && !list) return;
    event.preventDefault();
    go(state.step + KEYS[event.key], list);
  });
  articleList.addEventListener("change", () => choose(Number(articleList.value), 0));
  rowList.addEventListener("change", () => choose(state.article, Number(rowList.value)));
  byId("previous").addEventListener("click", () => go(state.step - 1));
  byId("next").addEventListener("click", () => go(state.step + 1));
  let width = 0;
  new ResizeObserver(() => {
    if (explorer.clientWidth !== width) { width = explorer.clientWidth; draw(); }
  }).observe(explorer);

  byId("example").hidden = true;
  explorer.hidden = false;
  fillArticles();
  choose(0, 0);
  width = explorer.clientWidth;
})();
