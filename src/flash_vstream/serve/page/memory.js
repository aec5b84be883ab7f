// The memory as a picture: each part a row of thumbnails, and above them what stretch each slot spans.
const PARTS = ["temporal", "retrieved", "spatial", "abstract"];
const ABOUT = {
  temporal: "scenes, merged as the stream goes on; the bar is how many frames a scene stands for",
  retrieved: "real frames of the heaviest scenes, in full detail",
  spatial: "the newest frame, in full detail",
  abstract: "a digest of the whole stream",
};
export function clock(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const whole = Math.floor(seconds);
  const two = (value) => String(value).padStart(2, "0");
  const hours = Math.floor(whole / 3600);
  return `${hours ? `${hours}:${two(Math.floor(whole / 60) % 60)}` : Math.floor(whole / 60)}:${two(whole % 60)}`;
}

const rows = new Map(); // part -> its element, kept so that scrolling survives a refresh
let lit = null;

// A slot that has been merged away since lives on in the scene that took it up.
const holds = (data, slot) => data.part === "temporal" && Number(data.start) <= slot.exemplar && slot.exemplar <= Number(data.end);
const same = (data, slot) => data.part === slot.part && Number(data.exemplar) === slot.exemplar;

function relight() {
  if (!lit) return;
  const all = [...document.querySelectorAll(".slot, .span i")];
  const exact = all.filter((element) => same(element.dataset, lit));
  const chosen = new Set(exact.length ? exact : all.filter((element) => holds(element.dataset, lit)));
  for (const element of all) element.classList.toggle("lit", chosen.has(element));
}

export function light(slot) {
  lit = slot;
  relight();
  document.querySelector(".slot.lit")?.scrollIntoView({ behavior: "smooth", block: "nearest", inline: "center" });
}

const about = ({ part, exemplar, start, end }) => ({ part, exemplar, start, end });

function draw(slot, heaviest) {
  const card = document.createElement("div");
  card.className = "slot";
  Object.assign(card.dataset, about(slot));
  const picture = document.createElement(slot.thumbnail ? "img" : "div");
  if (slot.thumbnail) {
    picture.src = slot.thumbnail;
    picture.alt = `Frame at ${clock(slot.exemplar)}`;
  } else picture.className = "none";
  const bar = document.createElement("div");
  bar.className = "bar";
  bar.style.width = `${Math.max(4, (100 * slot.weight) / heaviest)}%`;
  bar.style.background = `var(--${slot.part})`;
  const span = document.createElement("span");
  span.textContent = slot.end > slot.start ? `${clock(slot.start)} – ${clock(slot.end)}` : clock(slot.start);
  const weight = document.createElement("span");
  weight.textContent = slot.weight === 1 ? "1 frame" : `${Math.round(slot.weight)} frames`;
  card.append(picture, bar, span, weight);
  return card;
}

function row(part) {
  if (!rows.has(part)) {
    const section = document.createElement("div");
    section.className = "part";
    section.innerHTML = `<h3><i class="swatch"></i>${part}</h3><p class="quiet"></p><div class="slots" tabindex="0"></div>`;
    section.querySelector(".swatch").style.background = `var(--${part})`;
    section.querySelector(".slots").setAttribute("aria-label", `${part} memory`);
    rows.set(part, section);
  }
  return rows.get(part);
}

export function showMemory(memory) {
  const first = Math.min(...memory.slots.map((slot) => slot.start));
  const length = Math.max(memory.time - first, 1e-6);
  const count = memory.slots.length;
  document.getElementById("memory-note").textContent =
    `${memory.frames.toLocaleString()} frames in ${count} slots, and it will never be more than full`;
  const bars = PARTS.flatMap((part, level) => memory.slots.filter((slot) => slot.part === part).map((slot) => {
    const bar = document.createElement("i");
    Object.assign(bar.dataset, about(slot));
    bar.style.cssText = `left:${(100 * (slot.start - first)) / length}%;width:${(100 * (slot.end - slot.start)) / length}%;top:${2 + 9 * level}px;height:7px;background:var(--${part})`;
    return bar;
  }));
  const [begin, end] = [document.createElement("b"), document.createElement("b")];
  begin.textContent = clock(first);
  end.textContent = clock(memory.time);
  end.style.right = "0";
  document.getElementById("span").replaceChildren(...bars, begin, end);
  const shown = PARTS.filter((part) => memory.slots.some((slot) => slot.part === part));
  const parts = document.getElementById("parts");
  for (const part of shown) {
    const own = memory.slots.filter((slot) => slot.part === part);
    const heaviest = Math.max(...own.map((slot) => slot.weight));
    const element = row(part);
    element.querySelector("p").textContent = ABOUT[part];
    const slots = element.querySelector(".slots");
    const scrolled = slots.scrollLeft;
    slots.replaceChildren(...own.map((slot) => draw(slot, heaviest)));
    if (!parts.contains(element)) parts.append(element);
    slots.scrollLeft = scrolled;
  }
  relight();
}
