// What one stream is watched for, and the newest alerts about it.
import { call, streamPath } from "/page/api.js";
import { openDelete } from "/page/dialogs.js";
import { $, calmly, clock, count, el, reconcile, setText } from "/page/dom.js";
import { showClip, showMoment } from "/page/stage.js";

const PAGE = 20;
const WHEN = { starts: "when it starts", ends: "when it ends", every: "when it starts and ends", lasts: "while it lasts" };
const PHASES = { away: "not seen now", coming: "seen just now", asking: "looking closely", there: "there now", refused: "not sure enough", paused: "paused" };
const DOTS = { coming: "starting", asking: "starting", there: "live" };
const STATES = { start: "started", update: "still there", end: "ended" };
const AFTERWARDS = 10; // polls after the newest frame, for what is found in it later
const shown = { name: null, kept: null, polls: 0, newest: null, older: null, told: false };
const pictures = new Map(); // alert -> the address of its picture, or a promise of it

export function openAlerts(name) {
  Object.assign(shown, { name, kept: null, polls: 0, newest: null, older: null, told: false });
  for (const id of ["watches", "alerts-list"]) $(id).replaceChildren();
  for (const id of ["alerts-error", "alert-announcement"]) setText($(id), "");
  for (const picture of pictures.values()) picture.then((url) => url && URL.revokeObjectURL(url));
  pictures.clear();
  $("older-alerts").hidden = true;
}

// Called on every poll: asks for the watches if there were new frames lately, and for alerts if there are new ones.
export async function updateAlerts(stream) {
  if (shown.name !== stream.name) return;
  const isFirst = shown.kept === null;
  if (shown.kept !== stream.kept) shown.polls = AFTERWARDS;
  shown.kept = stream.kept;
  if (!isFirst && (!shown.polls || !$("watches").children.length)) return;
  shown.polls = Math.max(0, shown.polls - 1);
  try {
    await refresh();
  } catch (error) {
    if (shown.name === stream.name) shown.kept = null; // the next poll asks again
    throw error;
  }
}

async function refresh() {
  const { name } = shown;
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
  const targets = watch.targets.length ? " · sent on" : "";
  setText(item.querySelector(".rule"), `Told ${WHEN[watch.when]} · ${watch.events ? `seen ${count(watch.events, "time")}` : "not seen yet"}${targets}`);
  setText(item.querySelector(".error"), watch.error ?? watch.targets.map((target) => target.error).find(Boolean) ?? "");
  setText(pause, watch.paused ? "Go on" : "Pause");
  pause.setAttribute("aria-label", `${watch.paused ? "Go on" : "Pause"}: ${watch.event}`);
  remove.setAttribute("aria-label", `Delete: ${watch.event}`);
  pause.onclick = () => change(pause, () => call(watchPath(watch.id), { method: "PATCH", body: { paused: !watch.paused } }));
  remove.onclick = () => openDelete(watch.event, async () => {
    await call(watchPath(watch.id), { method: "DELETE" });
    await refresh();
    $("delete-watch").addEventListener("close", () => $("event").focus({ preventScroll: true }), { once: true });
  });
}

const watchPath = (id) => `${streamPath(shown.name)}/watches/${encodeURIComponent(id)}`;

// Does something to the watches, once however often `button` is pressed, and shows what came of it. A button that was
// disabled would lose the focus.
async function change(button, work) {
  if (button.ariaBusy) return;
  button.ariaBusy = "true";
  setText($("alerts-error"), "");
  try {
    await work();
    await refresh();
    shown.polls = AFTERWARDS;
  } catch (error) {
    setText($("alerts-error"), error.message);
  } finally {
    button.ariaBusy = null;
  }
}

$("tell").onsubmit = (event) => {
  event.preventDefault();
  const form = event.target;
  const { event: what, when, least, quiet, url, secret } = form.elements;
  const body = { event: what.value.trim(), when: when.value, min_seconds: Number(least.value), cooldown_seconds: Number(quiet.value) };
  if (url.value.trim()) body.targets = [{ url: url.value.trim(), ...(secret.value ? { secret: secret.value } : {}) }];
  change(form.querySelector("[type=submit]"), async () => {
    await call(`${streamPath(shown.name)}/watches`, { method: "POST", body });
    form.reset();
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
  const picture = el("img", { alt: "" });
  const button = el("button", { type: "button", class: "shot", "aria-label": `Show ${about}` }, picture);
  load(alert.id).then((url) => {
    if (!url) return;
    picture.src = url;
    button.onclick = () => {
      showMoment(url, about, false);
      scrollToStage();
    };
  });
  const play = alert.clip ? el("button", { type: "button", class: "small play", "aria-label": `Play ${about}` }, "Play") : null;
  if (play) play.onclick = () => playClip(play, alert, about);
  return el("li", {}, button, el("div", { class: "about" },
    el("p", {}, el("b", {}, alert.event), " ", el("span", { class: "what" }, STATES[alert.state])),
    el("p", { class: "quiet" }, `${clock(alert.time)} · ${dayAndTime(alert.clock)}`),
    alert.sentence ? el("p", { class: "said" }, alert.sentence) : null, play));
}

// Fetches an alert's clip, for which the server may have to wait, and plays it unless another stream is shown by then.
async function playClip(button, alert, about) {
  if (button.ariaBusy) return;
  button.ariaBusy = "true";
  setText(button, "Getting it…");
  setText($("alerts-error"), "");
  try {
    const clip = await call(alert.clip, { blob: true });
    if (!button.isConnected) return;
    showClip(URL.createObjectURL(clip), about);
    scrollToStage();
  } catch (error) {
    if (button.isConnected) setText($("alerts-error"), error.message);
  } finally {
    button.ariaBusy = null;
    setText(button, "Play");
  }
}

const scrollToStage = () => $("stage").scrollIntoView({ block: "nearest", behavior: calmly() });

// The address of an alert's picture; null if it has none any more.
function load(id) {
  if (!pictures.has(id)) {
    const picture = call(`/v1/alerts/${encodeURIComponent(id)}/picture`, { blob: true });
    pictures.set(id, picture.then((blob) => URL.createObjectURL(blob), () => null));
  }
  return pictures.get(id);
}

function dayAndTime(seconds) {
  const then = new Date(1000 * seconds);
  const time = then.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  const isToday = then.toDateString() === new Date().toDateString();
  return isToday ? time : `${then.toLocaleDateString([], { day: "numeric", month: "short" })}, ${time}`;
}

$("older-alerts").onclick = async () => {
  const { name } = shown;
  const oldest = $("alerts-list").lastElementChild.dataset.key;
  await change($("older-alerts"), async () => {
    const alerts = await call(`${streamPath(name)}/alerts?limit=${PAGE}&before=${oldest}`);
    if (name !== shown.name) return;
    shown.older = oldest;
    $("older-alerts").hidden = alerts.length < PAGE;
    add(alerts);
  });
};
