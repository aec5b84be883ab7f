// The browser's camera as a stream: started, sent, stopped, and reconnected when the server returns.
import { call, openFrames, streamPath } from "/page/api.js";
import { $, setText } from "/page/dom.js";

const FPS = 2;
const RETRY_SECONDS = [0.5, 5];
let camera = null; // { name, fps, media, video, canvas, socket, timer, since, failures, missed }

// The reason this page cannot use a camera; null if it can.
export function cameraObstacle() {
  if (!window.isSecureContext) {
    return `Browsers let a page use the camera only over HTTPS or on localhost, but this page came over plain HTTP from ${location.host}. `
      + "Open it over https:// (docs/server.md says how), or on the machine that runs the server.";
  }
  return navigator.mediaDevices?.getUserMedia ? null : "This browser does not let pages use a camera.";
}

function reasonOf(error) {
  const reasons = {
    NotAllowedError: "You or your browser's settings denied access to it.",
    NotFoundError: "No camera was found.",
    NotReadableError: "Another program is using it.",
  };
  return `Your camera could not be used. ${reasons[error.name] ?? error.message}`;
}

// Requests the camera and calls `create(spec)` to make its stream; throws errors whose messages are for users.
export async function startCamera(names, create) {
  const obstacle = cameraObstacle();
  if (obstacle) throw new Error(obstacle);
  if (camera) throw new Error(`Your camera is already on as ${camera.name}.`);
  const media = await navigator.mediaDevices.getUserMedia({ video: { width: 640, height: 480 } })
    .catch((error) => { throw new Error(reasonOf(error)); });
  let number = 1;
  while (names.includes(`camera-${number}`)) number += 1;
  const video = Object.assign(document.createElement("video"), { muted: true, playsInline: true, srcObject: media });
  const started = { name: `camera-${number}`, fps: FPS, media, video, canvas: document.createElement("canvas"), failures: 0, missed: 0 };
  try {
    await video.play();
    await create({ name: started.name, source: "push", fps: FPS });
  } catch (error) {
    for (const track of media.getTracks()) track.stop();
    throw error;
  }
  camera = started;
  camera.since = performance.now();
  media.getVideoTracks()[0].onended = () => stopCamera("Your camera was unplugged or switched off.");
  setText($("camera-name"), camera.name);
  $("camera").hidden = false;
  connect(started);
}

export function stopCamera(why = "") {
  if (!camera) return;
  const { media, socket, timer } = camera;
  camera = null;
  clearTimeout(timer);
  socket?.close();
  for (const track of media.getTracks()) track.stop();
  $("camera").hidden = true;
  if (why) notify(why);
}

export const cameraStream = () => camera?.name ?? null;

export function renameCamera(name) {
  if (!camera) return;
  camera.name = name;
  setText($("camera-name"), name);
}

export function setCameraRate(fps) {
  if (camera && fps) camera.fps = fps;
}

function notify(message) {
  document.dispatchEvent(new CustomEvent("notice", { detail: message }));
}

// --- sending

function connect(own) {
  const socket = openFrames(own.name);
  own.socket = socket;
  socket.onopen = () => {
    Object.assign(own, { failures: 0, missed: 0, since: performance.now() });
    sendFrame(own);
  };
  // The server acknowledges each frame, so a slow server gets fewer.
  socket.onmessage = () => {
    clearTimeout(own.timer);
    own.timer = setTimeout(() => sendFrame(own), 1000 / own.fps);
  };
  socket.onclose = () => {
    clearTimeout(own.timer);
    if (own === camera && own.socket === socket) again(own);
  };
}

function sendFrame(own) {
  const { canvas, video, socket } = own;
  if (own !== camera || socket.readyState !== WebSocket.OPEN) return;
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  canvas.getContext("2d").drawImage(video, 0, 0);
  canvas.toBlob((blob) => {
    if (blob && socket.readyState === WebSocket.OPEN) socket.send(blob);
    else own.timer = setTimeout(() => sendFrame(own), 1000 / own.fps);
  }, "image/jpeg", 0.85);
}

// Reconnects after the connection broke. If the server restarted, the stream is created again. If the stream is
// missing twice in a row, it was deleted and the camera stops; once may only mean that this page is renaming it.
async function again(own) {
  const [first, most] = RETRY_SECONDS;
  await new Promise((resolve) => setTimeout(resolve, 1000 * Math.min(most, first * 2 ** own.failures)));
  own.failures += 1;
  if (own !== camera) return;
  try {
    await call(streamPath(own.name)).catch(async (error) => {
      if (error.status !== 404) throw error;
      const { uptime_seconds: uptime } = await call("/healthz");
      if (own !== camera) return;
      const restarted = uptime < (performance.now() - own.since) / 1000;
      own.missed += 1;
      if (!restarted && own.missed < 2) throw error;
      if (!restarted) return stopCamera(`Your camera is off: its stream ${own.name} was removed.`);
      await call("/v1/streams", { method: "POST", body: { name: own.name, source: "push", fps: own.fps } });
      own.since = performance.now();
    });
    if (own === camera) connect(own);
  } catch {
    if (own === camera) again(own); // still away
  }
}

$("stop-camera").onclick = () => stopCamera();
