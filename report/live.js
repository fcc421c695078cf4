"use strict";
const rows = [], charts = new Map();
let place = 0, life = null, told = null, failures = 0;
const at = (id) => document.getElementById(id);
const svg = (name, attributes, text) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (text !== undefined) made.textContent = text;
  return made;
};
const html = (name, kind, text) => {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  if (text !== undefined) made.textContent = text;
  return made;
};
const short = (value) => {
  const size = Math.abs(value);
  if (size >= 1000 && size < 1e6) return Math.round(value).toLocaleString("en");
  if (size >= 1e6) return value.toExponential(3).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(4)));
};
function ticks(low, high) {
  if (!(high - low > 1e-9 * Math.max(Math.abs(low), Math.abs(high)))) {
    const apart = Math.abs(low) / 10 || 1;
    low -= apart; high += apart;
  }
  const power = 10 ** Math.floor(Math.log10((high - low) / 5));
  const apart = [1, 2, 5, 10, 20].map((m) => m * power).find((a) => a * 5 > (high - low) * 0.99);
  const found = [];
  for (let n = Math.floor(low / apart + 1e-9); n <= Math.ceil(high / apart - 1e-9); n++) {
    found.push(n * apart);
  }
  return found;
}
function decades(low, high) {
  const first = Math.floor(Math.log10(low) + 1e-9), last = Math.ceil(Math.log10(high) - 1e-9);
  const apart = Math.ceil((last - first) / 5), found = [];
  for (let power = first; power < last + apart; power += apart) found.push(10 ** power);
  return found;
}
function thinned(points) {  // of each stretch its lowest and its highest
  if (points.length <= 600) return points;
  const size = Math.ceil(points.length / 300), kept = [];
  for (let start = 0; start < points.length; start += size) {
    const part = points.slice(start, start + size);
    const by = (better) => part.reduce((a, b) => (better(b[1], a[1]) ? b : a));
    const ends = [by((x, y) => x < y), by((x, y) => x > y)].sort((a, b) => a[0] - b[0]);
    kept.push(...(ends[0] === ends[1] ? [ends[0]] : ends));
  }
  return kept;
}
function draw(chart) {
  const lines = chart.keys.map((key) => [key, thinned(
    rows.filter((row) => Number.isFinite(row.step) && Number.isFinite(row[key]))
      .map((row) => [row.step, row[key]]))]).filter(([, points]) => points.length);
  if (!lines.length) return;
  const show = chart.share ? (v) => `${Number((100 * v).toPrecision(4))} %` : short;
  const every = lines.flatMap(([, points]) => points);
  const values = every.map((point) => point[1]);
  const ends = [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
  const wide = chart.may_be_wide && ends[0] > 0 && ends[1] > 100 * ends[0];
  const marks = wide ? decades(...ends) : ticks(...ends);
  const title = chart.title + (wide ? ", log scale" : "");
  const end = lines.reduce((most, [, points]) => Math.max(most, points[points.length - 1][0]), 1);
  const low = marks[0], high = marks[marks.length - 1];
  const [left, right, top, bottom] = [52, 396, 26, 206];
  const x = (step) => (left + (step / end) * (right - left)).toFixed(1);
  const part = (v) => wide ? Math.log(v / low) / Math.log(high / low) : (v - low) / (high - low);
  const y = (value) => (bottom - part(value) * (bottom - top)).toFixed(1);
  const said = lines.map(([key, points]) => `${key} ${show(points[points.length - 1][1])}`);
  const picture = svg("svg", { viewBox: "0 0 420 246", role: "img",
    "aria-label": `${title} over the steps: ${said.join(", ")}` });
  picture.append(svg("text", { x: 4, y: 13 }, title));
  for (const mark of marks) {
    picture.append(svg("path", { class: "grid", d: `M${left} ${y(mark)}H${right}` }));
    picture.append(svg("text", { class: "end", x: left - 7, y: Number(y(mark)) + 4 }, show(mark)));
  }
  for (const mark of ticks(0, end).filter((m) => m <= end)) {
    picture.append(svg("path", { class: "tick", d: `M${x(mark)} ${bottom}v5` }));
    picture.append(svg("text", { class: "mid", x: x(mark), y: bottom + 19 }, short(mark)));
  }
  picture.append(svg("text", { class: "end", x: right, y: bottom + 36 }, "step"));
  const keys = html("figcaption");
  for (const [key, points] of lines) {
    const kind = key.split("/")[0];
    const way = points.map((point) => `${x(point[0])},${y(point[1])}`).join(" ");
    picture.append(svg("polyline", { class: kind, points: way }));
    if (points.length === 1 || (points.length <= 40 && kind !== "train")) {
      for (const point of points) {
        const dot = svg("circle", { class: kind, cx: x(point[0]), cy: y(point[1]), r: 2.5 });
        dot.append(svg("title", {}, `${key} ${show(point[1])} at step ${point[0]}`));
        picture.append(dot);
      }
    }
    const now = show(points[points.length - 1][1]);
    keys.append(html("span", `key ${kind}`, lines.length > 1 ? `${key} ${now}` : now));
  }
  if (!charts.has(chart.title)) {
    charts.set(chart.title, html("figure"));
    at("charts").append(charts.get(chart.title));
  }
  charts.get(chart.title).replaceChildren(picture, keys);
}
function show() {
  document.title = `${told.name}: ${told.state}`;
  at("best").textContent = told.best;
  at("what").textContent = told.about;
  at("state").textContent = told.state;
  at("state").className = told.state;
  at("reason").textContent = told.reason;
  at("facts").replaceChildren(...told.facts.map(([name, value]) => {
    const pair = html("div");
    pair.append(html("dt", "", name), html("dd", "", value));
    return pair;
  }));
  told.charts.forEach(draw);
}
async function follow() {
  let wait = 2000;
  try {
    const answer = await fetch(`rows?from=${place}&life=${life ?? ""}`, { cache: "no-store" });
    if (!answer.ok) throw new Error(answer.status);
    told = await answer.json();
    if (told.from === 0) rows.length = 0;
    rows.push(...told.rows);
    [place, life, failures] = [told.to, told.life, 0];
    show();
    at("foot").textContent = "Follows the run's files, and changes none of them.";
    wait = told.more ? 0 : told.state === "running" ? 2000 : 10000;
  } catch (error) {
    failures += 1;
    at("foot").textContent = `No answer (${failures}): python -m report live has ended, or the ` +
      "tunnel. What is shown is of before.";
    wait = Math.min(30000, 2000 * failures);
  }
  setTimeout(follow, wait);
}
follow();
