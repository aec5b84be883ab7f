// The page: chooses the view, and polls the streams once a second.
import { openAlerts, renameWatchDraft, updateAlerts } from "/page/alerts.js";
import { call, streamPath } from "/page/api.js";
import { cameraObstacle, cameraStream, renameCamera, setCameraRate, startCamera, stopCamera } from "/page/camera.js";
import { draftOf, dropDraft, openChat, renameDraft, updateChat } from "/page/chat.js";
import { askForToken, openAdd, openEdit, openRemove, setUpAdd, setUpEdit, setUpRemove, setUpToken } from "/page/dialogs.js";
import { $, clock, count, el, reconcile, rove, setText } from "/page/dom.js";
import { openMemory, updateMemory } from "/page/memory.js";
import { showOverview } from "/page/overview.js";
import { openStage, stopLive, updateStage } from "/page/stage.js";

const LOOK_SECONDS = 1;
const state = { streams: [], name: null, view: null, known: false, locked: false, removing: null };
const looks = { begun: 0, shown: 0 };
const tabs = rove($("streams"), "[role=tab]");

const nameInAddress = () => (location.hash.startsWith("#/") ? location.hash.slice(2) : null);
const go = (name) => { location.hash = `#/${name}`; };

// --- views: the overview, a stream, a missing stream, no streams, locked

// The view named in the address; without one, the only stream or the overview.
function chooseView() {
  const names = state.streams.map((stream) => stream.name);
  let wanted = nameInAddress();
  if (wanted === null || (wanted === state.removing && !names.includes(wanted))) wanted = names.length === 1 ? names[0] : "";
  if (state.locked) return { view: "locked", name: null };
  if (!state.known) return { view: null, name: null };
  if (names.includes(wanted)) return { view: "watching", name: wanted };
  if (wanted) return { view: "gone", name: wanted };
  return { view: names.length ? "overview" : "empty", name: null };
}

function show() {
  const { view, name } = chooseView();
  const changed = view !== state.view || name !== state.name;
  Object.assign(state, { view, name });
  if (changed) open(view, name);
  drawTabs();
  if (view === "overview") showOverview(state.streams);
  if (view === "watching") drawStream(state.streams.find((stream) => stream.name === name));
}

function open(view, name) {
  stopLive();
  for (const id of ["locked", "watching", "gone", "overview", "empty"]) $(id).hidden = id !== view;
  document.title = name && view === "watching" ? `${name} – flash-vstream` : "flash-vstream";
  $("to-question").hidden = view !== "watching";
  if (view === "gone") {
    setText($("gone-name"), name);
    setText($("gone-draft"), draftOf(name) && `You were typing: “${draftOf(name)}”`);
  }
  if (view !== "watching") return;
  setText($("stream-name"), name);
  openStage();
  openMemory(name);
  openAlerts(name);
  openChat(name);
}

function drawTabs() {
  const names = state.streams.map((stream) => stream.name);
  const entries = [...(names.length > 1 ? [""] : []), ...names];
  $("streams").hidden = !entries.length || state.locked;
  reconcile($("streams"), entries, (name) => name, createTab, (tab, name) => {
    const chosen = state.view === "overview" ? name === "" : name === state.name;
    tab.setAttribute("aria-selected", String(chosen));
    const stream = state.streams.find((one) => one.name === name);
    if (stream) tab.querySelector("i").dataset.state = stream.state;
  });
  tabs.refresh($("streams").querySelector("[aria-selected=true]"));
}

function createTab(name) {
  const controls = name ? "watching" : "overview";
  return el("button", { type: "button", role: "tab", "aria-controls": controls, onclick: () => go(name) },
    name ? el("i", { class: "dot" }) : null, name || "All");
}

function drawStream(stream) {
  setText($("state"), stream.state);
  $("state").dataset.state = stream.state;
  if (stream.time === null || stream.state !== "live") setText($("clock"), clock(stream.time));
  setText($("source"), stream.source);
  setText($("trouble"), stream.error && stream.state !== "live" ? stream.error : "");
  setText($("summary"), `${count(stream.fps, "frame")} per second · ${stream.kept.toLocaleString("en")} remembered · ${stream.skipped.toLocaleString("en")} skipped${stream.recorded ? " · recorded" : ""}`);
  const ms = (seconds) => (seconds === null ? "–" : `${Math.round(1000 * seconds)} ms`);
  const facts = [
    ["Lag", stream.state === "live" && stream.lag !== null ? `${stream.lag.toFixed(1)} s` : "–"],
    ["Encoding one frame", ms(stream.encode_seconds)],
    ["Writing it to memory", ms(stream.write_seconds)],
    ["Reconnects", stream.restarts.toLocaleString("en")],
  ];
  reconcile($("numbers"), facts, ([name]) => name, ([name]) => el("div", {}, el("dt", {}, name), el("dd")),
    (row, [, value]) => setText(row.lastChild, value));
  updateStage(stream);
  if (stream.name === cameraStream()) setCameraRate(stream.fps);
}

// --- adding, editing, removing

async function create(spec) {
  await call("/v1/streams", { method: "POST", body: spec });
  dropDraft(spec.name);
  await look();
  go(spec.name);
}

async function useCamera() {
  const names = state.streams.map((stream) => stream.name);
  try {
    await startCamera(names, create);
    $("add").close();
  } catch (error) {
    openAdd(error.message);
  }
}

setUpAdd(create);
setUpRemove(async (name) => {
  state.removing = name; // so that the page does not say someone else removed it
  await call(streamPath(name), { method: "DELETE" });
  if (cameraStream() === name) stopCamera();
  dropDraft(name);
  if (state.name === name) history.replaceState(null, "", location.pathname);
  await look();
});
setUpEdit(async (before, after) => {
  if (before !== after) {
    renameDraft(before, after);
    renameWatchDraft(before, after);
    if (cameraStream() === before) renameCamera(after);
    history.replaceState(null, "", `#/${after}`);
  }
  await look();
});
setUpToken(() => {
  state.locked = false;
  look();
});
$("remove-stream").onclick = () => openRemove(state.name);
$("edit-stream").onclick = () => openEdit(state.streams.find((stream) => stream.name === state.name));
$("enter-token").onclick = askForToken;
for (const button of document.querySelectorAll("[data-open-add]")) button.onclick = () => openAdd();
for (const button of document.querySelectorAll("[data-use-camera]")) button.onclick = useCamera;
for (const place of document.querySelectorAll("[data-camera-obstacle]")) setText(place, cameraObstacle() ?? "");
$("to-question").onclick = (event) => {
  event.preventDefault();
  $("question").focus();
};
$("notice-close").onclick = () => { $("notice").hidden = true; };
document.addEventListener("notice", (event) => {
  setText($("notice-text"), event.detail);
  $("notice").hidden = false;
});

// --- polling the streams

function drawConnection(message) {
  setText($("connection"), message);
  $("connection").hidden = !message;
  document.body.classList.toggle("away", Boolean(message));
  if (!message) return;
  for (const pill of document.querySelectorAll(".state")) setText(pill, "offline");
}

async function look() {
  if (state.locked) return;
  const number = (looks.begun += 1);
  try {
    const streams = await call("/v1/streams");
    if (number < looks.shown) return; // a later poll was answered first
    looks.shown = number;
    Object.assign(state, { streams, known: true });
    drawConnection("");
    show();
    if (state.view !== "watching") return;
    await updateChat();
    const stream = state.streams.find((one) => one.name === state.name);
    if (!stream) return;
    await updateMemory(stream);
    await updateAlerts(stream);
  } catch (error) {
    if (error.status === 401) lock();
    else if (error.away) drawConnection("The server is not responding. Trying again…");
    else if (error.status === 404) return; // removed during the poll; the next one shows that
    else if (error.status) drawConnection(error.message);
    else throw error;
  }
}

function lock() {
  Object.assign(state, { locked: true, streams: [] });
  stopLive();
  drawConnection("");
  show();
  askForToken();
}

async function lookOften() {
  for (;;) {
    if (!document.hidden) await look().catch((error) => setTimeout(() => { throw error; }));
    await new Promise((resolve) => setTimeout(resolve, 1000 * LOOK_SECONDS));
  }
}

window.addEventListener("hashchange", () => {
  show();
  look();
});
document.addEventListener("visibilitychange", () => document.hidden || look());
lookOften();
