// The page: streams along the top, the live picture, the chat, and the memory as it is compressed.
import { call, openFrames, sendEvents, setToken } from "/page/api.js";
import { clock, light, showMemory } from "/page/memory.js";

const $ = (id) => document.getElementById(id);
const HINTS = ["What is happening now?", "What happened first?", "What have you seen until now?"];
const state = { names: [], name: null, camera: null, loaded: null };

// --- streams

async function refreshStreams() {
  const streams = await call("/v1/streams");
  const names = streams.map((stream) => stream.name);
  if (names.join("\n") !== state.names.join("\n")) {
    state.names = names;
    if (!names.includes(state.name)) await select(names[0] ?? null);
    drawTabs();
  }
  $("main").hidden = !names.length;
  $("empty").hidden = Boolean(names.length);
  const mine = streams.find((stream) => stream.name === state.name);
  if (mine) drawStatus(mine);
}

function drawTabs() {
  $("streams").replaceChildren(...state.names.map((name) => {
    const tab = document.createElement("button");
    tab.type = "button";
    tab.textContent = name;
    tab.setAttribute("aria-current", String(name === state.name));
    tab.onclick = () => select(name).then(drawTabs);
    return tab;
  }));
}

async function select(name) {
  state.name = name;
  $("picture").removeAttribute("src");
  $("log").replaceChildren();
  $("parts").replaceChildren();
  $("span").replaceChildren();
  if (!name) return;
  $("stream-name").textContent = name;
  document.title = `${name} – flash-vstream`;
  for (const entry of await call(`/v1/streams/${name}/history?limit=20`)) {
    const turn = addTurn(entry.question);
    if (entry.answer !== null) finish(turn, { ...entry.details, text: entry.answer });
    else fail(turn, entry.error ?? "not answered yet");
  }
  await refreshPicture();
}

function drawStatus(stream) {
  $("state").textContent = stream.state;
  $("state").dataset.state = stream.state;
  $("clock").textContent = clock(stream.time);
  $("source").textContent = stream.source;
  $("delete").hidden = false;
  $("stop-camera").hidden = state.camera?.name !== stream.name;
  const ms = (seconds) => (seconds === null ? "–" : `${Math.round(1000 * seconds)} ms`);
  const rows = [
    ["Frames kept", stream.kept.toLocaleString()],
    ["Skipped", stream.skipped.toLocaleString()],
    ["Lag", stream.state === "live" && stream.lag !== null ? `${stream.lag.toFixed(1)} s` : "–"],
    ["Encode", ms(stream.encode_seconds)],
    ["Write", ms(stream.write_seconds)],
  ];
  if (stream.restarts) rows.push(["Restarts", stream.restarts]);
  if (stream.error) rows.push(["Trouble", stream.error]);
  $("numbers").replaceChildren(...rows.flatMap(([name, value]) => {
    const [dt, dd] = [document.createElement("dt"), document.createElement("dd")];
    dt.textContent = name;
    dd.textContent = value;
    return [dt, dd];
  }));
}

async function refreshPicture() {
  const name = state.name;
  if (!name) return;
  try {
    const [picture, memory] = await Promise.all([
      call(`/v1/streams/${name}/picture`, { blob: true }), call(`/v1/streams/${name}/memory`),
    ]);
    if (name !== state.name) return;
    if (state.loaded) URL.revokeObjectURL(state.loaded);
    $("picture").src = state.loaded = URL.createObjectURL(picture);
    showMemory(memory);
  } catch (error) {
    if (error.status !== 409 && error.status !== 404) throw error; // no frame yet, or just removed
  }
}

// --- the chat

function addTurn(question) {
  const turn = $("turn").content.firstElementChild.cloneNode(true);
  turn.querySelector(".asked").textContent = question;
  turn.querySelector(".answered").classList.add("waiting");
  $("log").append(turn);
  $("log").scrollTop = $("log").scrollHeight;
  return turn;
}

function finish(turn, answer) {
  const said = turn.querySelector(".answered");
  said.classList.remove("waiting");
  said.textContent = answer.text;
  const speed = answer.first_token_seconds ? `, first word after ${answer.first_token_seconds.toFixed(2)} s` : "";
  const found = (answer.mentions ?? []).map((event) => `, “${event.text}” ${event.seen ? `at ${clock(event.time)}` : "not seen"}`);
  turn.querySelector(".meta").textContent = `as of ${clock(answer.stream_time)}${found.join("")}${speed}`;
  const shown = (answer.evidence ?? []).filter((slot) => slot.thumbnail).sort((a, b) => b.share - a.share);
  turn.querySelector(".evidence").replaceChildren(...shown.slice(0, 6).map((slot) => {
    const button = document.createElement("button");
    button.type = "button";
    const picture = document.createElement("img");
    picture.src = slot.thumbnail;
    picture.alt = "";
    button.append(picture, clock(slot.exemplar));
    button.title = `${slot.part} memory, ${clock(slot.start)} to ${clock(slot.end)}, ${Math.round(100 * slot.share)}% of the attention`;
    button.setAttribute("aria-label", `Looked at ${button.title}`);
    button.onclick = () => light(slot);
    return button;
  }));
  $("log").scrollTop = $("log").scrollHeight;
}

function fail(turn, message) {
  const said = turn.querySelector(".answered");
  said.classList.remove("waiting");
  said.classList.add("failed");
  said.textContent = message;
}

async function ask(question) {
  const turn = addTurn(question);
  const said = turn.querySelector(".answered");
  try {
    const body = { question, stream: true };
    for await (const [kind, value] of sendEvents(`/v1/streams/${state.name}/questions`, body)) {
      if (kind === "text") said.textContent += value.text;
      if (kind === "done") finish(turn, value);
      if (kind === "error") fail(turn, value.message);
    }
  } catch (error) {
    fail(turn, error.message);
  }
}

$("ask").onsubmit = (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question) return;
  $("question").value = "";
  ask(question);
};
$("hints").replaceChildren(...HINTS.map((hint) => {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = hint;
  button.onclick = () => ask(hint);
  return button;
}));

// --- adding and removing

function openAdd() {
  $("add-error").textContent = "";
  $("add").showModal();
}

$("open-add").onclick = openAdd;
for (const button of document.querySelectorAll("[data-open-add]")) button.onclick = openAdd;
for (const button of document.querySelectorAll("[data-use-camera]")) button.onclick = useCamera;
$("add-cancel").onclick = () => $("add").close();
$("add-form").onsubmit = async (event) => {
  event.preventDefault();
  const form = new FormData(event.target);
  const spec = { name: form.get("name"), source: form.get("source"), fps: Number(form.get("fps")), loop: form.has("loop") };
  try {
    await create(spec);
    $("add").close();
    event.target.reset();
  } catch (error) {
    $("add-error").textContent = error.message;
  }
};

async function create(spec) {
  await call("/v1/streams", { method: "POST", body: spec });
  await refreshStreams();
  await select(spec.name);
  drawTabs();
}

$("delete").onclick = async () => {
  if (!confirm(`Stop watching ${state.name} and forget what it remembers?`)) return;
  if (state.camera?.name === state.name) stopCamera();
  await call(`/v1/streams/${state.name}`, { method: "DELETE" });
  await refreshStreams();
};

async function useCamera() {
  try {
    const media = await navigator.mediaDevices.getUserMedia({ video: { width: 640, height: 480 } });
    let number = 1;
    while (state.names.includes(`camera-${number}`)) number += 1;
    const name = `camera-${number}`;
    await create({ name, source: "push", fps: 2 });
    $("add").close();
    const video = document.createElement("video");
    video.muted = true;
    video.srcObject = media;
    await video.play();
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
    const socket = openFrames(name);
    const timer = setInterval(() => {
      if (socket.readyState !== WebSocket.OPEN || socket.bufferedAmount) return;
      canvas.getContext("2d").drawImage(video, 0, 0);
      canvas.toBlob((blob) => blob && socket.readyState === WebSocket.OPEN && socket.send(blob), "image/jpeg", 0.85);
    }, 500);
    state.camera = { name, media, socket, timer };
  } catch (error) {
    if (!$("add").open) openAdd();
    $("add-error").textContent = `Your camera could not be used: ${error.message}`;
  }
}

function stopCamera() {
  clearInterval(state.camera.timer);
  state.camera.socket.close();
  for (const track of state.camera.media.getTracks()) track.stop();
  state.camera = null;
}
$("stop-camera").onclick = stopCamera;

// --- the clockwork

function needToken() {
  return new Promise((resolve) => {
    $("token-form").onsubmit = (event) => {
      setToken(new FormData(event.target).get("token"));
      resolve();
    };
    $("token-dialog").showModal();
  });
}

async function every(seconds, work) {
  for (;;) {
    try {
      if (!document.hidden) await work();
    } catch (error) {
      if (error.status === 401 && !$("token-dialog").open) await needToken();
      else if (error.status === undefined) $("state").textContent = "server away";
    }
    await new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
  }
}

every(1, refreshStreams);
every(1, refreshPicture);
