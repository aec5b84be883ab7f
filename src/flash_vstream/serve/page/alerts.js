// The watches of one stream, and its newest alerts.
import { call, streamPath } from "/page/api.js";
import { openDelete } from "/page/dialogs.js";
import { $, calmly, clock, count, el, once, reconcile, setText } from "/page/dom.js";
import { showClip, showMoment } from "/page/stage.js";

const PAGE = 20;
const WHEN = { starts: "when it starts", ends: "when it ends", every: "when it starts or ends", lasts: "while it lasts" };
const PHASES = { away: "not there now", coming: "just seen", asking: "taking a closer look", there: "there now", refused: "not sure enough", paused: "paused" };
const DOTS = { coming: "starting", asking: "starting", there: "live" };
const STATES = { start: "started", update: "still there", end: "ended" };
const AFTERWARDS = 10; // polls after the newest frame, for what is found in it later
const IDLE_SECONDS = 10; // between two requests for the watches while there are none: one may be added elsewhere
const shown = { name: null, kept: null, polls: 0, asked: 0, newest: null, older: null, told: false };
let drafted = null; // the stream for which the form is filled in

export function openAlerts(name) {
  if (drafted !== name) $("tell").reset(); // its secret and its webhook are of another stream
  drafted = name;
  Object.assign(shown, { name, kept: null, polls: 0, newest: null, older: null, told: false });
  for (const picture of $("alerts-list").querySelectorAll("img[src]")) URL.revokeObjectURL(picture.src);
  for (const id of ["watches", "alerts-list"]) $(id).replaceChildren();
  for (const id of ["alerts-error", "alert-announcement"]) setText($(id), "");
  $("older-alerts").hidden = true;
}

export function renameWatchDraft(before, after) {
  if (drafted === before) drafted = after;
}

// Called on every poll: asks for the watches if there were new frames lately, and for alerts if there are new ones.
export async function updateAlerts(stream) {
  if (shown.name !== stream.name) return;
  const isFirst = shown.kept === null;
  if (shown.kept !== stream.kept) shown.polls = AFTERWARDS;
  shown.kept = stream.kept;
  if (!isFirst && !shown.polls) return;
  shown.polls = Math.max(0, shown.polls - 1);
  const isIdle = !$("watches").children.length && performance.now() - shown.asked < 1000 * IDLE_SECONDS;
  if (!isFirst && isIdle) return;
  try {
    await refresh();
  } catch (error) {
    if (shown.name === stream.name) shown.kept = null; // the next poll asks again
    throw error;
  }
}

async function refresh() {
  const { name } = shown;
  shown.asked = performance.now();
  const watches = await call(`${streamPath(name)}/watches`);
  if (name !== shown.name) return;
  reconcile($("watches"), watches, (watch) => watch.id, createWatch, updateWatch);
  $("watches").hidden = !watches.length;
  const newest = watches.map((watch) => watch.newest_alert).join();
  if (shown.newest === newest) return;
  const alerts = await call(`${streamPath(name)}/alerts?limit=${PAGE}`);
  if (name !== shown.name) return;
  shown.newest = newest;
  if (shown.older === null) $("older-alerts").hidden = alerts.length < PAGE;
  if (shown.told) announce(alerts.at(-1));
  shown.told = true;
  add(alerts);
}

// --- watches

function createWatch({ id }) {
  const pause = el("button", { type: "button", class: "small" });
  const remove = el("button", { type: "button", class: "small danger" }, "Delete");
  return el("li", { id: `watch-${id}` },
    el("div", { class: "about" }, el("b"), el("p", { class: "phase quiet" }, el("i", { class: "dot" }), el("span")),
      el("p", { class: "rule quiet" }), el("p", { class: "error" })),
    el("div", { class: "row" }, pause, remove));
}

function updateWatch(item, watch) {
  const [pause, remove] = item.querySelectorAll("button");
  setText(item.querySelector("b"), watch.event);
  item.querySelector(".dot").dataset.state = DOTS[watch.phase] ?? "";
  setText(item.querySelector(".phase span"), PHASES[watch.phase] ?? watch.phase);
  const targets = watch.targets.length ? " · forwarded" : "";
  setText(item.querySelector(".rule"), `Alerts ${WHEN[watch.when]} · ${watch.events ? `seen ${count(watch.events, "time")}` : "not seen yet"}${targets}`);
  setText(item.querySelector(".error"), watch.error ?? watch.targets.map((target) => target.error).find(Boolean) ?? "");
  setText(pause, watch.paused ? "Resume" : "Pause");
  pause.setAttribute("aria-label", `${watch.paused ? "Resume" : "Pause"}: ${watch.event}`);
  remove.setAttribute("aria-label", `Delete: ${watch.event}`);
  pause.onclick = () => change(pause, () => call(watchPath(watch.id), { method: "PATCH", body: { paused: !watch.paused } }));
  remove.onclick = () => openDelete(watch.event, async () => {
    await call(watchPath(watch.id), { method: "DELETE" });
    await refresh();
    $("delete-watch").addEventListener("close", () => $("event").focus({ preventScroll: true }), { once: true });
  });
}

const watchPath = (id) => `${streamPath(shown.name)}/watches/${encodeURIComponent(id)}`;

// Does something to the watches and shows the outcome, unless another stream is shown by then.
const change = (button, work) => once(button, async () => {
  const { name } = shown;
  setText($("alerts-error"), "");
  try {
    await work(name);
    await refresh();
    shown.polls = AFTERWARDS;
  } catch (error) {
    if (name === shown.name) setText($("alerts-error"), error.message);
  }
});

$("tell").onsubmit = (event) => {
  event.preventDefault();
  const form = event.target;
  const { event: what, when, least, quiet, url, secret } = form.elements;
  const body = { event: what.value.trim(), when: when.value, min_seconds: Number(least.value), cooldown_seconds: Number(quiet.value) };
  if (url.value.trim()) body.targets = [{ url: url.value.trim(), ...(secret.value ? { secret: secret.value } : {}) }];
  change(form.querySelector("[type=submit]"), async (name) => {
    await call(`${streamPath(name)}/watches`, { method: "POST", body });
    if (name === drafted) form.reset();
  });
};

// --- alerts

function announce(alert) {
  if (alert) setText($("alert-announcement"), `${alert.event}: ${STATES[alert.state]} at ${clock(alert.time)}. ${alert.sentence}`);
}

// Adds alerts to those on the page, newest first.
function add(alerts) {
  const known = new Set([...$("alerts-list").children].map((item) => item.dataset.key));
  for (const alert of alerts) {
    if (known.has(alert.id)) continue;
    const item = createAlert(alert);
    item.dataset.key = alert.id;
    item.dataset.clock = alert.clock;
    const later = [...$("alerts-list").children].find((other) => Number(other.dataset.clock) <= alert.clock);
    $("alerts-list").insertBefore(item, later ?? null);
  }
}

function createAlert(alert) {
  const about = `${alert.event}, ${STATES[alert.state]} at ${clock(alert.time)}`;
  const button = el("button", { type: "button", class: "shot", "aria-label": `Show ${about}` }, el("img", { alt: "" }));
  button.onclick = () => once(button, () => showPicture(button, alert, about));
  once(button, () => load(button, alert)).catch(() => {}); // a click tries again
  const play = alert.clip ? el("button", { type: "button", class: "small play", "aria-label": `Play ${about}` }, "Play") : null;
  if (play) play.onclick = () => once(play, () => playClip(play, alert, about));
  return el("li", {}, button, el("div", { class: "about" },
    el("p", {}, el("b", {}, alert.event), " ", el("span", { class: "what" }, STATES[alert.state])),
    el("p", { class: "quiet" }, `${clock(alert.time)} · ${dayAndTime(alert.clock)}`),
    alert.sentence ? el("p", { class: "said" }, alert.sentence) : null, play));
}

// Fetches an alert's clip, for which the server may have to wait, and plays it unless another stream is shown by then.
async function playClip(button, alert, about) {
  setText(button, "Loading…");
  setText($("alerts-error"), "");
  try {
    const clip = await call(alert.clip, { blob: true });
    if (!button.isConnected) return;
    showClip(URL.createObjectURL(clip), about);
    scrollToStage();
  } catch (error) {
    if (button.isConnected) setText($("alerts-error"), error.message);
  } finally {
    setText(button, "Play");
  }
}

const scrollToStage = () => $("stage").scrollIntoView({ block: "nearest", behavior: calmly() });

// Fetches an alert's picture into its button; if the picture is gone for good, so is the button.
async function load(button, { id }) {
  try {
    const picture = await call(`/v1/alerts/${encodeURIComponent(id)}/picture`, { blob: true });
    if (button.isConnected) button.firstElementChild.src = URL.createObjectURL(picture);
  } catch (error) {
    if (error.status === 404) button.replaceWith(el("span", { class: "shot" }, "No picture"));
    throw error;
  }
}

async function showPicture(button, alert, about) {
  const picture = button.firstElementChild;
  setText($("alerts-error"), "");
  try {
    if (!picture.src) await load(button, alert);
    if (!button.isConnected) return;
    showMoment(picture.src, about, false);
    scrollToStage();
  } catch (error) {
    if (button.isConnected) setText($("alerts-error"), error.message);
  }
}

function dayAndTime(seconds) {
  const then = new Date(1000 * seconds);
  const time = then.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  const isToday = then.toDateString() === new Date().toDateString();
  return isToday ? time : `${then.toLocaleDateString([], { day: "numeric", month: "short" })}, ${time}`;
}

$("older-alerts").onclick = async () => {
  const oldest = $("alerts-list").lastElementChild.dataset.key;
  await change($("older-alerts"), async (name) => {
    const alerts = await call(`${streamPath(name)}/alerts?limit=${PAGE}&before=${oldest}`);
    if (name !== shown.name) return;
    shown.older = oldest;
    $("older-alerts").hidden = alerts.length < PAGE;
    add(alerts);
  });
};
