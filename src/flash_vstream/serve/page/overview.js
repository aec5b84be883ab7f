// All streams at a glance.
import { call, streamPath } from "/page/api.js";
import { $, clock, count, el, reconcile, setText } from "/page/dom.js";

const shown = new Map(); // stream -> { kept, url }

export function showOverview(streams) {
  reconcile($("grid"), streams, (stream) => stream.name, createCard, updateCard);
  for (const stream of streams) refreshPicture(stream);
  for (const [name, { url }] of shown) {
    if (streams.some((stream) => stream.name === name)) continue;
    URL.revokeObjectURL(url);
    shown.delete(name);
  }
}

function createCard({ name }) {
  return el("li", {},
    el("a", { href: `#/${name}` },
      el("span", { class: "picture" }, el("img", { alt: "" }), el("span", { class: "state" }), el("span", { class: "clock" })),
      el("b", {}, name), el("span", { class: "quiet" })));
}

function updateCard(card, stream) {
  const state = card.querySelector(".state");
  state.dataset.state = stream.state;
  setText(state, stream.state);
  setText(card.querySelector(".clock"), clock(stream.time));
  setText(card.querySelector(".quiet"), stream.state !== "live" && stream.error ? stream.error : count(stream.kept, "frame"));
}

// Fetches a picture only if there is a new one and the last fetch has finished.
async function refreshPicture(stream) {
  const before = shown.get(stream.name) ?? { kept: null, url: null };
  if (stream.time === null || before.kept === stream.kept || before.loading) return;
  shown.set(stream.name, { ...before, loading: true });
  try {
    const url = URL.createObjectURL(await call(`${streamPath(stream.name)}/picture`, { blob: true }));
    const picture = [...$("grid").children].find((card) => card.dataset.key === stream.name)?.querySelector("img");
    if (picture) picture.src = url;
    if (before.url) URL.revokeObjectURL(before.url);
    shown.set(stream.name, { kept: stream.kept, url });
  } catch {
    shown.set(stream.name, before); // stream or server gone; the next poll shows which
  }
}
