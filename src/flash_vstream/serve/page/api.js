// Calls to the server. A token, if needed, is kept for the lifetime of the tab.
import { bytesOf, parsePictures } from "/page/multipart.js";
import { parseEvents, textOf } from "/page/sse.js";

// HTTP headers can carry only Latin-1.
export const canBeSent = (token) => /^[\x20-\x7e\xa0-\xff]+$/.test(token);

export function getToken() {
  const token = sessionStorage.getItem("token");
  return token && canBeSent(token) ? token : null;
}

export const setToken = (token) => (token ? sessionStorage.setItem("token", token) : sessionStorage.removeItem("token"));

const headers = () => (getToken() ? { authorization: `Bearer ${getToken()}` } : {});

export const streamPath = (name) => `/v1/streams/${encodeURIComponent(name)}`;

// Errors carry the server's message and status; without any response they are marked `away`.
async function send(path, options) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw Object.assign(new Error("The server is not responding."), { away: true });
  }
  if (response.ok) return response;
  let message = `The server answered with status ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch { /* no body to read */ }
  throw Object.assign(new Error(message), { status: response.status });
}

function withBody(method, body) {
  return { method, headers: { ...headers(), "content-type": "application/json" }, body: JSON.stringify(body) };
}

export async function call(path, { method = "GET", body, blob = false } = {}) {
  const response = await send(path, body === undefined ? { method, headers: headers() } : withBody(method, body));
  if (response.status === 204) return null;
  return blob ? response.blob() : response.json();
}

// The events of an answer as { event, data }, with data parsed.
export async function* ask(name, question) {
  const response = await send(`${streamPath(name)}/questions`, withBody("POST", { question, stream: true }));
  for await (const { event, data } of parseEvents(textOf(response))) yield { event, data: JSON.parse(data) };
}

// A stream's pictures as they arrive, as { time, bytes }.
export async function* livePictures(name, signal) {
  const response = await send(`${streamPath(name)}/live`, { headers: headers(), signal });
  yield* parsePictures(bytesOf(response));
}

export function openFrames(name) {
  const scheme = location.protocol === "https:" ? "wss" : "ws";
  const query = getToken() ? `?token=${encodeURIComponent(getToken())}` : "";
  return new WebSocket(`${scheme}://${location.host}${streamPath(name)}/frames${query}`);
}
