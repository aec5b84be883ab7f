// Adding, editing and removing streams, deleting watches, and the token.
import { call, canBeSent, getToken, setToken, streamPath } from "/page/api.js";
import { $, setText } from "/page/dom.js";

// A form in a dialog: if `work(form)` throws, shows the error's message; otherwise closes the dialog.
function onSubmit(dialog, work) {
  const form = dialog.querySelector("form");
  form.onsubmit = async (event) => {
    event.preventDefault();
    const button = form.querySelector("[type=submit]");
    setText(form.querySelector(".error"), "");
    button.disabled = true;
    try {
      await work(form);
      dialog.close();
    } catch (error) {
      showError(form, error.message);
    } finally {
      button.disabled = false;
    }
  };
  for (const button of form.querySelectorAll("[data-cancel]")) button.onclick = () => dialog.close();
}

const showError = (form, message) => setText(form.querySelector(".error"), message);

function open(dialog) {
  if (dialog.open) return;
  setText(dialog.querySelector(".error"), "");
  dialog.showModal();
}

// --- adding

export function openAdd(error = "") {
  open($("add"));
  showError($("add"), error);
}

export function setUpAdd(create) {
  onSubmit($("add"), async (form) => {
    const { name, source, fps } = form.elements;
    await create({ name: name.value, source: source.value.trim(), fps: Number(fps.value), loop: form.elements.loop.checked });
    form.reset();
  });
}

// --- editing

let edited = null;

export function openEdit(stream) {
  edited = stream;
  const { name, fps } = $("edit").querySelector("form").elements;
  name.value = stream.name;
  fps.value = stream.fps;
  open($("edit"));
}

// `done(before, after)` is called with the stream's old and new name.
export function setUpEdit(done) {
  onSubmit($("edit"), async (form) => {
    const { name, fps } = form.elements;
    const change = {};
    if (name.value !== edited.name) change.name = name.value;
    if (Number(fps.value) !== edited.fps) change.fps = Number(fps.value);
    if (!Object.keys(change).length) return;
    await call(streamPath(edited.name), { method: "PATCH", body: change });
    await done(edited.name, name.value);
  });
}

// --- removing

export function openRemove(name) {
  setText($("remove-name"), name);
  open($("remove"));
}

export function setUpRemove(remove) {
  onSubmit($("remove"), () => remove($("remove-name").textContent));
}

// --- deleting a watch

export function openDelete(event, remove) {
  setText($("delete-event"), event);
  onSubmit($("delete-watch"), remove);
  open($("delete-watch"));
}

// --- the token

export function askForToken() {
  if ($("token-dialog").open) return;
  open($("token-dialog"));
  if (getToken()) showError($("token-dialog"), "The server no longer accepts this token.");
}

export function setUpToken(unlocked) {
  onSubmit($("token-dialog"), async (form) => {
    const token = form.elements.token.value.trim();
    if (!canBeSent(token)) throw new Error("This token contains characters that cannot be sent.");
    const before = getToken();
    setToken(token);
    try {
      await call("/v1/streams");
    } catch (error) {
      setToken(before);
      form.elements.token.select();
      throw error.status === 401 ? new Error("This is not the server's token.") : error;
    }
    form.reset();
    unlocked();
  });
}
