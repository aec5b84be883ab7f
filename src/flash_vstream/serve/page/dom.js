// Small helpers: elements, formatting of times and sizes, lists that keep focus, a single Tab stop per group.

export const $ = (id) => document.getElementById(id);

// el("p", { class: "quiet", "aria-label": "…", onclick }, "text", child)
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element[name] = value;
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// Writes text only if it changed, so that screen readers announce only changes.
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// 83.4 -> "1:23", 3723 -> "1:02:03"
export function clock(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const whole = Math.floor(seconds);
  const two = (value) => String(value).padStart(2, "0");
  const hours = Math.floor(whole / 3600);
  const minutes = Math.floor(whole / 60) % 60;
  return `${hours ? `${hours}:${two(minutes)}` : minutes}:${two(whole % 60)}`;
}

export function duration(seconds) {
  if (seconds < 99.5) return `${Math.round(seconds)} s`;
  if (seconds < 5970) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} days`;
}

export function megabytes(bytes) {
  return bytes < 1e6 ? `${Math.round(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

export const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

// Makes the children of `parent` show `items`; elements with known keys are reused, which keeps their focus.
export function reconcile(parent, items, keyOf, create, update) {
  const known = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  const keys = new Set(items.map((item) => String(keyOf(item))));
  for (const [key, child] of known) if (!keys.has(key)) child.remove();
  items.forEach((item, index) => {
    const key = String(keyOf(item));
    let child = known.get(key);
    if (!child) {
      child = create(item);
      child.dataset.key = key;
    }
    if (parent.children[index] !== child) parent.insertBefore(child, parent.children[index] ?? null);
    update(child, item);
  });
}

// Does `work` unless what `button` did last is still going on. A button that was disabled would lose the focus.
export async function once(button, work) {
  if (button.ariaBusy) return;
  button.ariaBusy = "true";
  try {
    await work();
  } finally {
    button.ariaBusy = null;
  }
}

// A single Tab stop for the elements matching `selector` in `group`; arrow keys, Home and End move between them.
export function rove(group, selector) {
  const members = () => [...group.querySelectorAll(selector)];
  const choose = (chosen) => {
    for (const member of members()) member.tabIndex = member === chosen ? 0 : -1;
  };
  group.addEventListener("focusin", (event) => {
    const member = event.target.closest(selector);
    if (member) choose(member);
  });
  group.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return; // the browser's
    const all = members();
    const at = all.indexOf(document.activeElement);
    const last = all.length - 1;
    const steps = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: last };
    if (at < 0 || !(event.key in steps)) return;
    event.preventDefault();
    all[Math.max(0, Math.min(last, steps[event.key]))].focus();
  });
  return {
    // Call after members were added or removed: one of them keeps the Tab stop, `wanted` if present.
    refresh(wanted) {
      const all = members();
      const kept = all.find((member) => member === document.activeElement)
        ?? all.find((member) => member === wanted) ?? all.find((member) => member.tabIndex === 0) ?? all[0];
      choose(kept);
    },
  };
}

export const calmly = () => (matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth");
