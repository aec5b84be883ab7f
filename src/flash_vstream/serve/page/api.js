// Calls to the server. A token, where one is needed, lives as long as the tab.
const headers = () => {
  const token = sessionStorage.getItem("token");
  return token ? { authorization: `Bearer ${token}` } : {};
};

export const setToken = (token) => sessionStorage.setItem("token", token);

async function failure(response) {
  let message = `the server answered ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch { /* no body to read */ }
  return Object.assign(new Error(message), { status: response.status });
}

export async function call(path, { method = "GET", body, blob = false } = {}) {
  const options = { method, headers: headers(), cache: "no-store" };
  if (body !== undefined) {
    options.headers["content-type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  const response = await fetch(path, options);
  if (!response.ok) throw await failure(response);
  if (response.status === 204) return null;
  return blob ? response.blob() : response.json();
}

// Server-sent events of a POST, as [kind, value] pairs.
export async function* sendEvents(path, body) {
  const response = await fetch(path, {
    method: "POST", headers: { ...headers(), "content-type": "application/json" }, body: JSON.stringify(body),
  });
  if (!response.ok) throw await failure(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    waiting += value;
    const events = waiting.split("\n\n");
    waiting = events.pop();
    for (const event of events) {
      const [, kind, data] = event.match(/^event: (\w+)\ndata: (.*)$/s);
      yield [kind, JSON.parse(data)];
    }
  }
}

export function openFrames(name) {
  const token = sessionStorage.getItem("token");
  const scheme = location.protocol === "https:" ? "wss" : "ws";
  const query = token ? `?token=${encodeURIComponent(token)}` : "";
  return new WebSocket(`${scheme}://${location.host}/v1/streams/${name}/frames${query}`);
}
