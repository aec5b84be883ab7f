// The memory panel: how finely each moment is kept, how old it is, and how much it weighs.
import { call, streamPath } from "/page/api.js";
import { $, calmly, clock, count, duration, el, megabytes, reconcile, rove, setText } from "/page/dom.js";
import { showMoment } from "/page/stage.js";

// From finest to coarsest. A part not listed here is shown under its own name.
const PARTS = {
  spatial: ["Now", "The newest frame.", "Newest frame"],
  retrieved: ["Key frames", "Real frames that stand for the longest scenes.", "Key frame"],
  temporal: ["Scenes", "Everything so far. Frames that look alike merge into one scene, so no moment is dropped.", "Scene"],
  abstract: ["Gist", "A running summary of the whole stream. It has no pictures.", "Gist"],
};
const RECALLED = "Recalled"; // what evidence from the long-term memory is called, which no part shows
const known = { name: null, kept: null, memory: null, ended: false };
const pictures = new Map(); // exemplar -> data URL
let chosen = null; // the highlighted slot

export function openMemory(name) {
  Object.assign(known, { name, kept: null, memory: null, ended: false });
  pictures.clear();
  chosen = null;
  $("memory-body").hidden = true;
  setText($("memory-lead"), "Nothing yet. The memory fills as frames arrive.");
  for (const id of ["lanes", "budget", "parts"]) $(id).replaceChildren();
}

// Fetches the memory only after new frames were written, and only pictures not fetched before.
export async function updateMemory(stream) {
  const ended = stream.state === "ended";
  const isOutdated = ended !== known.ended;
  known.ended = ended;
  if (isOutdated && known.memory) draw(known.memory);
  if (stream.time === null || (stream.kept === known.kept && known.memory)) return;
  const { name } = known;
  const newest = Math.max(-1, ...pictures.keys());
  const memory = await call(`${streamPath(name)}/memory?thumbnails_after=${newest}`).catch((error) => {
    if (error.status === 409 || error.status === 404) return null; // no frame yet, or just removed
    throw error;
  });
  if (!memory || name !== known.name) return;
  Object.assign(known, { kept: stream.kept, memory });
  for (const slot of memory.slots) if (slot.thumbnail) pictures.set(slot.exemplar, slot.thumbnail);
  const wanted = new Set(memory.slots.map((slot) => slot.exemplar));
  for (const exemplar of pictures.keys()) if (!wanted.has(exemplar)) pictures.delete(exemplar);
  draw(memory);
}

export const pictureOf = (slot) => pictures.get(slot.exemplar) ?? null;

const nameOf = (part) => PARTS[part]?.[0] ?? part;
const spanOf = (slot) => (clock(slot.end) !== clock(slot.start) ? `${clock(slot.start)}–${clock(slot.end)}` : clock(slot.start));
const keyOf = (slot) => `${slot.part} ${slot.exemplar}`;

function ageOf(slot) {
  const age = known.memory.time - slot.end;
  return age < 0.5 ? "newest" : `${duration(age)} ${known.ended ? "earlier" : "ago"}`;
}

// A slot in a few words: "Scene 0:06–0:08, 3 frames".
export function describe(slot) {
  const frames = slot.weight > 1 ? `, ${count(Math.round(slot.weight), "frame")}` : "";
  const name = slot.part === "longterm" ? RECALLED : PARTS[slot.part]?.[2] ?? slot.part;
  return `${name} ${spanOf(slot)}${frames}`;
}

// --- drawing

function draw(memory) {
  const { slots, capacity } = memory;
  const parts = [...Object.keys(PARTS), ...Object.keys(capacity.parts).filter((part) => !(part in PARTS))];
  const shown = parts.filter((part) => slots.some((slot) => slot.part === part)).map((part) => {
    const [own, { slots: most, tokens }] = [slots.filter((slot) => slot.part === part), capacity.parts[part]];
    return { part, slots: own, most, tokens, used: own.length * tokens };
  });
  const tokens = shown.reduce((sum, row) => sum + row.used, 0);
  const first = Math.min(...slots.map((slot) => slot.start));
  $("memory-body").hidden = false;
  $("memory-lead").replaceChildren(
    el("b", {}, `${duration(memory.time - first)} of video`), ` (${count(memory.frames, "frame")}) in `,
    el("b", {}, `${count(tokens, "token")}, ${megabytes(capacity.bytes)}`),
    ". It stays this size no matter how long it watches.",
    memory.longterm.length ? ` ${count(memory.longterm.length, "more moment")} (at most ${capacity.longterm.slots}) can be recalled for questions.` : "",
  );
  drawBudget(shown, tokens);
  drawLanes(shown, first, memory.time);
  reconcile($("parts"), shown, (row) => row.part, createPart, (element, row) => updatePart(element, row, tokens));
  relight();
}

function drawBudget(shown, tokens) {
  reconcile($("budget"), shown, (row) => row.part, (row) => el("span", { "data-part": row.part }), (bar, row) => {
    bar.style.flexGrow = row.used;
    const room = ($("budget").clientWidth * row.used) / tokens;
    setText(bar, room > 10 * nameOf(row.part).length ? nameOf(row.part) : "");
    bar.title = `${nameOf(row.part)}: ${count(row.used, "token")}`;
  });
  const words = shown.map((row) => `${nameOf(row.part)} ${Math.round((100 * row.used) / tokens)}%`);
  $("budget").setAttribute("aria-label", `Share of the memory: ${words.join(", ")}`);
}

function drawLanes(shown, first, last) {
  const length = Math.max(last - first, 1e-6);
  reconcile($("lanes"), shown, (row) => row.part, (row) => el("div", { class: "lane", "data-part": row.part }), (lane, row) => {
    reconcile(lane, row.slots, keyOf, createBar, (bar, slot) => {
      bar.piece = slot; // so that a click shows what the bar says
      Object.assign(bar.dataset, { part: slot.part, exemplar: slot.exemplar, start: slot.start, end: slot.end });
      bar.style.left = `${(100 * (slot.start - first)) / length}%`;
      bar.style.width = `${(100 * (slot.end - slot.start)) / length}%`;
      bar.style.setProperty("--at", `${(100 * (slot.exemplar - slot.start)) / Math.max(slot.end - slot.start, 1e-6)}%`);
      bar.title = describe(slot);
    });
  });
  setText($("lanes-first"), clock(first));
  setText($("lanes-last"), known.ended ? `${clock(last)}, the end` : `${clock(last)}, now`);
}

function createBar() {
  const bar = el("i");
  bar.onclick = () => look(bar.piece);
  return bar;
}

const ropes = new WeakMap(); // a strip of slots -> its roving Tab stop

function createPart({ part }) {
  const [name, about] = PARTS[part] ?? [part, ""];
  const strip = el("div", { class: "slots", role: "group", "aria-label": `${name}, pieces of memory` });
  ropes.set(strip, rove(strip, ".slot"));
  return el("div", { class: "part", "data-part": part },
    el("div", { class: "about" },
      el("h3", {}, el("i", { class: "fineness", "aria-hidden": "true" }), el("span", {}, name), el("small", {}, part)),
      el("p", {}, about), el("p", { class: "numbers quiet" })),
    strip);
}

function updatePart(element, row, tokens) {
  const side = Math.round(Math.sqrt(row.tokens));
  element.style.setProperty("--cells", side);
  const fine = row.tokens === 1 ? "1 token each" : `${side} × ${side} tokens each`;
  const share = `${Math.round((100 * row.used) / tokens)}% of the memory`;
  setText(element.querySelector(".numbers"), `${row.slots.length} of ${row.most} · ${fine} · ${share}`);
  const heaviest = Math.max(...row.slots.map((slot) => slot.weight));
  const strip = element.querySelector(".slots");
  reconcile(strip, row.slots, keyOf, createSlot, (card, slot) => updateSlot(card, slot, heaviest));
  ropes.get(strip).refresh();
}

function createSlot(slot) {
  const card = el("button", { type: "button", class: "slot" });
  if (slot.part !== "abstract") card.append(el("span", { class: "shot" }, el("img", { alt: "" })));
  card.append(el("span", { class: "weight" }, el("i")), el("span", { class: "when" }));
  if (slot.part !== "abstract") card.append(el("span", { class: "age" })); // these slots all reach up to now
  if (slot.part !== "spatial" && slot.part !== "retrieved") card.append(el("span", { class: "many" })); // one frame each
  card.onclick = () => look(card.piece);
  return card;
}

function updateSlot(card, slot, heaviest) {
  card.piece = slot; // so that a click shows what the card says
  Object.assign(card.dataset, { part: slot.part, exemplar: slot.exemplar, start: slot.start, end: slot.end });
  const picture = card.querySelector("img");
  const url = pictureOf(slot);
  if (picture && url && picture.getAttribute("src") !== url) picture.src = url;
  card.querySelector(".weight i").style.width = `${Math.max(6, (100 * slot.weight) / heaviest)}%`;
  setText(card.querySelector(".when"), spanOf(slot));
  for (const age of card.querySelectorAll(".age")) setText(age, ageOf(slot));
  for (const many of card.querySelectorAll(".many")) setText(many, count(Math.round(slot.weight), "frame"));
  card.title = describe(slot);
}

// --- showing one slot

// A slot that has since been merged lives on in the scene it was merged into.
const holds = (data, slot) => data.part === "temporal" && Number(data.start) <= slot.exemplar && slot.exemplar <= Number(data.end);
const same = (data, slot) => data.part === slot.part && Number(data.exemplar) === slot.exemplar;

function relight() {
  if (!chosen) return;
  const all = [...document.querySelectorAll(".slot, .lane i")];
  const exact = all.filter((element) => same(element.dataset, chosen));
  const found = new Set(exact.length ? exact : all.filter((element) => holds(element.dataset, chosen)));
  for (const element of all) element.classList.toggle("lit", found.has(element));
}

// Highlights a slot and shows its picture on the stage; `picture` is for slots no longer in the memory.
export function look(slot, picture = null) {
  chosen = slot;
  relight();
  const card = document.querySelector(".slot.lit");
  const strip = card?.parentElement;
  strip?.scrollTo({ left: card.offsetLeft - strip.offsetLeft - (strip.clientWidth - card.clientWidth) / 2, behavior: calmly() });
  showMoment(picture ?? pictureOf(slot), describe(slot));
  $("stage").scrollIntoView({ block: "nearest", behavior: calmly() });
}

$("show-in-memory").onclick = () => {
  const card = document.querySelector(".slot.lit");
  (card ?? $("memory-title")).scrollIntoView({ block: "center", behavior: calmly() });
  card?.focus({ preventScroll: true });
};
