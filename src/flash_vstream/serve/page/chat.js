// Questions and answers about one stream. Shows the newest turns; fetches older ones on demand.
import { ask, call, streamPath } from "/page/api.js";
import { $, clock, el, once, rove, setText } from "/page/dom.js";
import { describe, look, pictureOf } from "/page/memory.js";

const PAGE = 20;
const EVIDENCE = 6;
const PENDING_SECONDS = 1;
const HINTS = ["What is happening now?", "What happened first?", "What have you seen so far?"];
const chat = { name: null, loaded: false, oldest: null };
const drafts = new Map(); // stream -> its half-typed question
const evidenceRope = rove($("log"), ".evidence button");

export function openChat(name) {
  Object.assign(chat, { name, loaded: false, oldest: null });
  $("log").replaceChildren();
  $("older").hidden = true;
  setText($("chat-error"), "");
  setText($("announcement"), "");
  $("question").value = drafts.get(name) ?? "";
}

export const draftOf = (name) => drafts.get(name) ?? "";
export const dropDraft = (name) => drafts.delete(name);

export function renameDraft(before, after) {
  drafts.set(after, draftOf(before));
  drafts.delete(before);
}

// --- history

// Loads the newest turns; called on every poll until it succeeds.
export async function updateChat() {
  if (chat.loaded) return;
  const { name } = chat;
  chat.loaded = true;
  try {
    const turns = await page(null);
    if (name !== chat.name) return;
    $("log").prepend(...turns);
    toNewest();
  } catch (error) {
    if (name === chat.name) chat.loaded = false;
    throw error;
  }
}

// The turns before the id `before`, oldest first, as elements.
async function page(before) {
  const { name } = chat;
  const entries = await call(`${streamPath(name)}/history?limit=${PAGE}${before === null ? "" : `&before=${before}`}`);
  if (name !== chat.name) return [];
  chat.oldest = entries[0]?.id ?? chat.oldest;
  $("older").hidden = entries.length < PAGE;
  return entries.map((entry) => {
    const turn = createTurn(entry.question);
    settle(turn, entry, name);
    return turn;
  });
}

// Shows the outcome of a question; polls again while it is still being answered.
async function settle(turn, entry, name) {
  if (entry.answer !== null) finish(turn, { ...entry.details, text: entry.answer });
  else if (entry.error !== null) fail(turn, entry.error);
  else {
    await new Promise((resolve) => setTimeout(resolve, 1000 * PENDING_SECONDS));
    if (!turn.isConnected) return;
    const [again] = await call(`${streamPath(name)}/history?limit=1&before=${entry.id + 1}`).catch(() => [entry]);
    await settle(turn, again ?? { ...entry, error: "This question no longer exists." }, name);
  }
}

$("older").onclick = () => once($("older"), async () => {
  const { name } = chat;
  const scroller = $("turns");
  try {
    setText($("chat-error"), "");
    const turns = await page(chat.oldest);
    if (name !== chat.name) return;
    const fromEnd = scroller.scrollHeight - scroller.scrollTop;
    $("log").prepend(...turns);
    scroller.scrollTop = scroller.scrollHeight - fromEnd; // keep the same turns in view
    evidenceRope.refresh();
    if ($("older").hidden) scroller.focus({ preventScroll: true });
  } catch (error) {
    if (name === chat.name) setText($("chat-error"), error.message);
  }
});

// --- turns

function createTurn(question) {
  const turn = $("turn").content.firstElementChild.cloneNode(true);
  turn.querySelector(".asked").textContent = question;
  turn.querySelector(".answered").classList.add("waiting");
  return turn;
}

const isAtEnd = () => $("turns").scrollHeight - $("turns").scrollTop - $("turns").clientHeight < 80;

function toNewest() {
  $("turns").scrollTop = $("turns").scrollHeight;
  const newest = $("log").lastElementChild?.querySelector(".evidence button");
  evidenceRope.refresh(newest);
}

function finish(turn, answer) {
  const said = turn.querySelector(".answered");
  said.classList.remove("waiting");
  said.textContent = answer.text;
  const facts = [`as of ${clock(answer.stream_time)}`];
  for (const event of answer.mentions ?? []) {
    facts.push(`“${event.text}” ${event.seen ? `at ${clock(event.time)}` : "not seen"}`);
  }
  const meta = turn.querySelector(".meta");
  meta.textContent = facts.join(" · ");
  if (answer.first_token_seconds) meta.title = `First word after ${answer.first_token_seconds.toFixed(1)} s`;
  const shown = mostLookedAt(answer.evidence ?? []);
  const place = turn.querySelector(".evidence");
  place.replaceChildren(...shown.map(evidence));
  if (shown.length) place.prepend(el("span", { class: "quiet" }, "Looked at"));
  evidenceRope.refresh();
}

// The slots with the largest shares, at most one per frame, whichever part of the memory it is in. Prefers slots
// with a picture; in old answers, whose pictures are gone, shows only the times.
function mostLookedAt(evidence) {
  const frames = new Map();
  const slots = evidence.filter((slot) => slot.part !== "abstract").sort((a, b) => b.share - a.share);
  for (const slot of slots) if (!frames.has(slot.exemplar)) frames.set(slot.exemplar, slot);
  const unique = [...frames.values()];
  const pictured = unique.filter((slot) => slot.thumbnail);
  return (pictured.length ? pictured : unique).slice(0, EVIDENCE);
}

function evidence(slot) {
  const url = slot.thumbnail ?? pictureOf(slot);
  const picture = el("img", { alt: "", width: 60, height: 60, src: url });
  const button = el("button", { type: "button", tabindex: -1 }, picture, el("span", {}, clock(slot.exemplar)));
  button.title = `${describe(slot)}, ${Math.round(100 * slot.share)}% of the attention`;
  button.setAttribute("aria-label", `${clock(slot.exemplar)}, show this moment: ${button.title}`);
  button.onclick = () => look(slot, url);
  return button;
}

function fail(turn, message) {
  const said = turn.querySelector(".answered");
  said.classList.remove("waiting");
  said.classList.add("failed");
  said.textContent = message;
}

// --- asking

async function answer(question) {
  const { name } = chat;
  const turn = createTurn(question);
  const said = turn.querySelector(".answered");
  $("log").append(turn);
  toNewest();
  try {
    for await (const { event, data } of ask(name, question)) {
      const following = name === chat.name && isAtEnd(); // do not scroll a user who is reading further up
      if (event === "text") said.textContent += data.text;
      else if (event === "done") finish(turn, data);
      else if (event === "error") fail(turn, data.message);
      if (following) toNewest();
    }
    if (said.classList.contains("waiting")) fail(turn, "The answer was cut off; please ask again.");
  } catch (error) {
    fail(turn, error.status || error.away ? error.message : "The connection was lost; please ask again.");
  }
  if (name === chat.name) setText($("announcement"), said.textContent);
}

$("question").oninput = () => drafts.set(chat.name, $("question").value);
$("ask").onsubmit = (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question) return;
  $("question").value = "";
  dropDraft(chat.name);
  answer(question);
};
$("hints").replaceChildren(...HINTS.map((hint) => el("button", { type: "button", onclick: () => answer(hint) }, hint)));
rove($("hints"), "button").refresh();
