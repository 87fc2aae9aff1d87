"use strict";
const report = JSON.parse(document.getElementById("report").textContent);
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const number = (n) => n.toLocaleString("en").replaceAll(",", "\u202f");
const percent = (part, whole) => (100 * part / Math.max(1, whole)).toFixed(1) + "\u202f%";

function shape(name, attributes, parent) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (parent) parent.append(made);
  return made;
}

function element(name, text, parent, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  if (parent) parent.append(made);
  return made;
}

// --- Packs ---------------------------------------------------------------------------------------

const place = (n) => "#sample-" + n;
let pack = 0;
let picked = -1;

function bar(parent, label, width, used) {
  const row = element("div", undefined, parent, "bar");
  element("span", label, row);
  const svg = shape("svg", { viewBox: `0 0 ${width} 10`, preserveAspectRatio: "none" }, row);
  element("span", percent(used, width), row);
  return svg;
}

function link(svg, n) {
  const a = shape("a", { href: place(n), "data-number": n, "aria-label": report.samples[n].id }, svg);
  a.classList.toggle("on", n === picked);
  return a;
}

function drawText(rows) {
  $("text-rows").replaceChildren();
  rows.forEach((samples, i) => {
    const used = samples.reduce((sum, [n]) => sum + report.samples[n].tokens, 0);
    const svg = bar($("text-rows"), i + 1, report.seq_len, used);
    for (const [n, offset, ...runs] of samples) {
      const a = link(svg, n);
      let x = offset;
      for (let k = 0; k < runs.length; k += 2) {
        shape("rect", { class: "t" + runs[k], x, y: 0, width: runs[k + 1], height: 8 }, a);
        x += runs[k + 1];
      }
      const set = report.sources.indexOf(report.samples[n].source) % 8;
      shape("rect", { class: "s" + set, x: offset, y: 8.4, width: x - offset, height: 1.6 }, a);
      shape("line", { class: "edge", x1: x, x2: x, y1: 0, y2: 10 }, svg);
    }
  });
}

function drawVision(classes) {
  $("vision-rows").replaceChildren();
  if (classes.length) {
    const legend = element("p", undefined, $("vision-rows"), "legend");
    [["w0", "picture"], ["w1", "frames"], ["w2", "codec group"]].forEach(([look, name]) => {
      element("i", undefined, legend, look);
      element("span", name, legend);
    });
  }
  classes.forEach((rows, c) => {
    const width = report.vision_rows[c][1];
    const title = element("h3", "Vision rows ", $("vision-rows"));
    element("small", `of ${number(width)} patches`, title);
    const box = element("div", undefined, $("vision-rows"), "bars thin");
    box.classList.toggle("two", rows.length > 8);
    rows.forEach((windows, i) => {
      const svg = bar(box, i + 1, width, windows.reduce((sum, w) => sum + w[2], 0));
      for (const [n, x, size, kind] of windows) {
        shape("rect", { class: "w" + kind, x, y: 0, width: size, height: 10 }, link(svg, n));
        shape("line", { class: "edge", x1: x + size, x2: x + size, y1: 0, y2: 10 }, svg);
      }
    });
  });
}

function drawOverview() {
  const count = report.packs.length;
  const svg = shape("svg", { viewBox: `0 0 ${count} 40`, preserveAspectRatio: "none" }, $("overview"));
  const slots = report.vision_rows.reduce((sum, [r, w]) => sum + r * w, 0);
  report.packs.forEach((p, i) => {
    const g = shape("g", { "data-pack": i }, svg);
    const tokens = 18 * p.tokens / (report.seq_len * p.rows.length);
    const patches = 18 * p.patches / Math.max(1, slots);
    shape("rect", { class: "hit", x: i, y: 0, width: 1, height: 40 }, g);
    shape("rect", { class: "tokens", x: i + 0.06, y: 19 - tokens, width: 0.88, height: tokens }, g);
    shape("rect", { class: "patches", x: i + 0.06, y: 21, width: 0.88, height: patches }, g);
    shape("title", {}, g).textContent =
      `pack ${i + 1}: tokens ${percent(tokens, 18)}, patches ${percent(patches, 18)}`;
    g.addEventListener("click", () => show(i));
  });
}

function show(i) {
  pack = Math.max(0, Math.min(report.packs.length - 1, i));
  const p = report.packs[pack];
  $("pack-at").value = pack;
  $("pack-name").textContent = `pack ${pack + 1} of ${report.packs.length}`;
  drawText(p.rows);
  drawVision(p.vision);
  document.querySelectorAll("#overview g").forEach((g, k) => g.classList.toggle("now", k === pack));
  light();
}

function light() {
  const here = picked >= 0 && report.samples[picked].pack === pack;
  document.querySelectorAll(".bar svg").forEach((svg) => svg.classList.toggle("lit", here));
  document.querySelectorAll(".bar a").forEach((a) =>
    a.classList.toggle("on", Number(a.dataset.number) === picked));
}

function describe(n) {
  const s = report.samples[n];
  const vision = s.patches ? `, ${number(s.patches)} patches, ${number(s.windows)} windows` : "";
  return `${s.source} · ${s.task ? s.task + " · " : ""}${s.kind}
${number(s.tokens)} tokens, ${number(s.loss)} with loss${vision}`;
}

function pick(n) {
  picked = n;
  const box = $("picked");
  box.hidden = n < 0;
  if (n < 0) return light();
  const s = report.samples[n];
  box.replaceChildren();
  element("code", s.id, box);
  element("span", describe(n).replace("\n", " · "), box);
  element("span", `${s.file}, line ${s.line}`, box, "path");
  if ($("sample-" + n)) element("a", "text and pictures", box).href = place(n);
  else element("small", "not among the samples in detail; raise --samples", box);
  if (s.pack !== pack) show(s.pack);
  light();
}

function fromAddress() {
  const match = /^#sample-(\d+)$/.exec(location.hash);
  if (!match || !report.samples[match[1]]) return;
  pick(Number(match[1]));
  const shown = document.querySelector(location.hash);
  if (shown) shown.scrollIntoView(); // the rows that were drawn meanwhile moved it
}

function hints() {
  const tip = $("tip");
  document.addEventListener("pointermove", (event) => {
    const a = event.target.closest && event.target.closest(".bar a");
    tip.hidden = !a;
    if (!a) return;
    const n = Number(a.dataset.number);
    tip.textContent = report.samples[n].id + "\n" + describe(n);
    const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
    tip.style.left = Math.max(8, left) + "px";
    tip.style.top = event.clientY + 18 + "px";
  });
}

// --- Codec clips ---------------------------------------------------------------------------------

function player(box) {
  const groups = report.clips[box.dataset.clip];
  const find = (name) => box.querySelector("." + name);
  const images = [...box.querySelectorAll("[data-group]")].map((g) => [...g.querySelectorAll("img")]);
  const size = report.block;
  const { width, height } = { width: images[0][0].naturalWidth, height: images[0][0].naturalHeight };
  const columns = width / size;
  const area = columns * (height / size);
  const frame = find("frame"), sheet = find("sheet"), range = find("frame-at");
  const across = Math.ceil(Math.sqrt(Math.max(...images.map((g) => g.length))));
  let group = 0, at = 0, timer = 0;
  [frame.width, frame.height] = [width, height];

  // The place of a block: number of its canvas, x and y on it.
  const onCanvas = (k) => [Math.floor(k / area), (k % area) % columns * size, Math.floor((k % area) / columns) * size];

  function blocks(context, list, outline) {
    for (let i = 0; i < list.length; i += 3) {
      const [canvas, x, y] = onCanvas(list[i]);
      const left = list[i + 2] * size, top = list[i + 1] * size;
      context.drawImage(images[group][canvas], x, y, size, size, left, top, size, size);
      if (outline) context.strokeRect(left + 0.5, top + 0.5, size - 1, size - 1);
    }
  }

  function drawFrame(g) {
    const context = frame.getContext("2d");
    const now = g.frames[at];
    context.clearRect(0, 0, width, height);
    context.strokeStyle = "#ffffff80";
    if (g.anchor !== null) {
      context.globalAlpha = at === g.anchor ? 1 : find("sum").checked ? 0.75 : 0.3;
      blocks(context, g.frames[g.anchor].blocks, false);
      context.globalAlpha = 1;
    }
    const first = find("sum").checked ? 0 : at;
    for (let i = first; i <= at; i += 1) {
      if (i !== g.anchor) blocks(context, g.frames[i].blocks, i === at);
    }
    const time = now.seconds === null ? "" : `${now.seconds} s · `;
    const what = at === g.anchor ? "whole" : `${now.blocks.length / 3} blocks`;
    find("frame-name").textContent = `${time}frame ${number(now.t)} · ${what}`;
  }

  function drawSheet(g) {
    const own = images[group];
    const down = Math.ceil(own.length / across);
    [sheet.width, sheet.height] = [across * width, down * height];
    const context = sheet.getContext("2d");
    context.globalAlpha = 0.4;
    own.forEach((image, i) => context.drawImage(image, i % across * width, Math.floor(i / across) * height));
    context.globalAlpha = 1;
    const list = g.frames[at].blocks;
    for (let i = 0; i < list.length; i += 3) {
      const [canvas, x, y] = onCanvas(list[i]);
      const left = canvas % across * width + x, top = Math.floor(canvas / across) * height + y;
      context.drawImage(own[canvas], x, y, size, size, left, top, size, size);
    }
    find("sheet-name").textContent = `the group's ${own.length} canvases · ${g.frames.length} frames`;
  }

  function drawCounts(g) {
    const svg = find("counts");
    const most = Math.max(...g.frames.map((f, i) => (i === g.anchor ? 0 : f.blocks.length)), 1);
    svg.setAttribute("viewBox", `0 0 ${g.frames.length} 46`);
    svg.replaceChildren();
    g.frames.forEach((f, i) => {
      const tall = 44 * Math.min(1, f.blocks.length / most);
      const kind = (i === g.anchor ? "whole" : "part") + (i === at ? " now" : "");
      shape("rect", { class: kind, x: i + 0.08, y: 46 - tall, width: 0.84, height: tall }, svg);
      const hit = shape("rect", { class: "hit", x: i, y: 0, width: 1, height: 46 }, svg);
      shape("title", {}, hit).textContent = `frame ${f.t}: ${f.blocks.length / 3} blocks`;
      hit.addEventListener("click", () => move(i));
    });
  }

  function draw() {
    const g = groups[group];
    range.max = g.frames.length - 1;
    range.value = at;
    find("group-at").value = group;
    drawFrame(g);
    drawSheet(g);
    drawCounts(g);
  }

  // After the last frame of a group comes the first of the next group.
  function move(i) {
    if (i >= groups[group].frames.length) [group, i] = [(group + 1) % groups.length, 0];
    if (i < 0) {
      group = (group + groups.length - 1) % groups.length;
      i = groups[group].frames.length - 1;
    }
    at = i;
    draw();
  }

  find("frame-back").addEventListener("click", () => move(at - 1));
  find("frame-next").addEventListener("click", () => move(at + 1));
  range.addEventListener("input", () => move(Number(range.value)));
  find("group-at").addEventListener("change", (event) => {
    group = Number(event.target.value);
    move(0);
  });
  find("sum").addEventListener("change", draw);
  find("play").addEventListener("click", () => {
    if (timer) clearInterval(timer);
    timer = timer ? 0 : setInterval(() => move(at + 1), 220);
    find("play").textContent = timer ? "Pause" : "Play";
  });
  // Start at the frame of the first group that has the most blocks.
  const parts = groups[0].frames.map((f, i) => (i === groups[0].anchor ? 0 : f.blocks.length));
  move(parts.indexOf(Math.max(...parts)));
  box.dataset.drawn = "yes";
}

async function codec(box) {
  await Promise.all([...box.querySelectorAll("img")].map((image) => image.decode()));
  player(box);
}

// --- Start ---------------------------------------------------------------------------------------

if (report.packs.length) {
  if (report.sources.length > 1) report.sources.forEach((name, i) => {
    element("i", undefined, $("set-legend"), "set-" + i % 8);
    element("span", name, $("set-legend"));
  });
  drawOverview();
  $("pack-at").addEventListener("input", (event) => show(Number(event.target.value)));
  $("pack-back").addEventListener("click", () => show(pack - 1));
  $("pack-next").addEventListener("click", () => show(pack + 1));
  document.querySelectorAll("[data-pack][data-number]").forEach((a) =>
    a.addEventListener("click", () => pick(Number(a.dataset.number))));
  $("grid").addEventListener("change", (event) =>
    document.body.classList.toggle("grid-on", event.target.checked));
  show(0);
  hints();
  fromAddress();
  window.addEventListener("hashchange", fromAddress);
}
document.querySelectorAll(".media .pic img").forEach((image) =>
  image.addEventListener("click", () => {
    const [large, text] = $("large").children;
    large.src = image.src;
    large.width = image.naturalWidth * Math.max(1, Math.floor(560 / image.naturalHeight));
    text.textContent = image.alt;
    $("large").showModal();
  }));
$("large").addEventListener("click", () => $("large").close());
document.querySelectorAll(".codec").forEach(codec);
