// The large picture: the live stream, or a moment from the memory.
import { livePictures } from "/page/api.js";
import { $, clock, setText } from "/page/dom.js";

const live = { abort: null, shownKept: null, url: null };
let cameFrom = null; // the element focused before a moment was shown

export function openStage() {
  stopLive();
  showLive();
  draw(null);
}

// Called on every poll: connects to the live pictures if there are new frames and no connection is open.
export function updateStage(stream) {
  $("no-frame").hidden = stream.time !== null;
  setText($("no-frame"), stream.error && stream.state !== "live" ? "No frames yet; see the reason below." : "Waiting for the first frame…");
  if (stream.time === null || live.abort || document.hidden || stream.kept === live.shownKept) return;
  live.shownKept = stream.kept;
  play(stream.name);
}

export function stopLive() {
  live.abort?.abort();
  live.abort = null;
  live.shownKept = null;
}

async function play(name) {
  const abort = new AbortController();
  live.abort = abort;
  try {
    for await (const picture of livePictures(name, abort.signal)) {
      if (abort.signal.aborted) return;
      draw(new Blob([picture.bytes], { type: "image/jpeg" }));
      if (!Number.isNaN(picture.time)) setText($("clock"), clock(picture.time));
    }
  } catch (error) {
    if (live.abort === abort) live.shownKept = null; // the next poll retries
    if (error.name !== "AbortError" && !error.away && !error.status && !(error instanceof TypeError)) throw error;
  } finally {
    if (live.abort === abort) live.abort = null;
  }
}

function draw(blob) {
  const before = live.url;
  live.url = blob && URL.createObjectURL(blob);
  if (live.url) $("picture").src = live.url;
  else $("picture").removeAttribute("src");
  if (before) URL.revokeObjectURL(before);
}

// Shows a picture of the past in place of the live one; `about` describes it. An alert's need not be in the memory.
export function showMoment(url, about, isRemembered = true) {
  cameFrom = document.activeElement;
  stopClip();
  if (url) $("moment-picture").src = url;
  $("moment-picture").hidden = !url;
  $("moment-none").hidden = Boolean(url);
  setText($("moment-about"), about);
  setText($("moment-kind"), isRemembered ? "Remembered" : "Alert");
  $("show-in-memory").hidden = !isRemembered;
  $("moment").hidden = false;
  $("stage").classList.add("past");
}

// Plays an alert's clip in place of the live picture; its address is released afterwards.
export function showClip(url, about) {
  showMoment(null, about, false);
  $("moment-none").hidden = true;
  const clip = $("moment-clip");
  clip.setAttribute("aria-label", `Clip: ${about}`);
  clip.hidden = false;
  clip.src = url;
  clip.play().catch(() => {}); // its controls start it where the browser does not
  $("stage").classList.add("playing");
}

function stopClip() {
  const clip = $("moment-clip");
  if (clip.hidden) return;
  URL.revokeObjectURL(clip.src);
  clip.removeAttribute("src");
  clip.load(); // stops it
  clip.hidden = true;
  $("stage").classList.remove("playing");
}

export function showLive() {
  stopClip();
  $("moment").hidden = true;
  $("moment-picture").removeAttribute("src");
  $("stage").classList.remove("past");
}

// Returns to the live picture, and the focus to the element that opened the moment.
export function leaveMoment() {
  showLive();
  if (cameFrom?.isConnected) cameFrom.focus({ preventScroll: true });
  cameFrom = null;
}

// The stage takes the shape of the frames, and marks the square that the model sees of wide ones.
$("picture").onload = ({ target }) => {
  const ratio = target.naturalWidth / target.naturalHeight;
  const picture = target.parentElement;
  picture.style.aspectRatio = Math.min(Math.max(ratio, 0.8), 2.4);
  picture.classList.toggle("wide", ratio > 1 && ratio <= 2.4);
};

$("back-to-live").onclick = leaveMoment;
document.addEventListener("visibilitychange", () => document.hidden && stopLive());
