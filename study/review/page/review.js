// The review's page: what is shown, the keys, and changes on their way to disk.

import { View, placeOf, shaded } from "./view.js";

const $ = (id) => document.getElementById(id);
const AHEAD = 2, KEPT = 7; // pictures fetched before they are wanted, and kept
const state = { images: [], names: false, chosen: 0, number: -1, image: null, views: [], active: 0 };
const look = { brightness: 0, contrast: 0 };
const pictures = new Map(); // address -> promise of pixels, the last used ones last
const queue = []; // changes that are not on disk yet
let sending = false, asked = 0;

// ---- asking

async function ask(address, body) {
  const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const answer = await fetch(address, options), values = await answer.json();
  return { status: answer.status, values };
}

function pixels(number, view = null) {
  const address = `pixels/${number}` + (view === null || view.fixed === null ? ""
    : `?fixed=${view.fixed}&at=${view.at}${view.turned ? "&turned=1" : ""}`);
  const found = pictures.get(address) ?? fetchPixels(address);
  pictures.delete(address);
  pictures.set(address, found);
  while (pictures.size > (state.views.length > 1 ? 200 : KEPT)) pictures.delete(pictures.keys().next().value);
  return found;
}

async function fetchPixels(address) {
  try {
    const answer = await fetch(address);
    if (!answer.ok) throw new Error((await answer.json()).message ?? `status ${answer.status}`);
    const what = JSON.parse(answer.headers.get("X-Pixels")), data = await answer.arrayBuffer();
    return { ...what, values: what.bytes === 1 ? new Uint8Array(data) : new Uint16Array(data) };
  } catch (error) {
    pictures.delete(address); // asked again the next time
    throw error;
  }
}

function say(text, warning = false) {
  $("message").textContent = text;
  $("message").classList.toggle("warning", warning);
}

// ---- showing an image

async function open(number) {
  if (number < 0 || number >= state.images.length) return;
  const ticket = ++asked;
  try {
    const first = state.views.length > 1 ? null : pixels(number).catch(() => null);
    const { values } = await ask(`image/${number}`);
    if (ticket !== asked) return;
    await first;
    if (ticket !== asked) return;
    show(number, values);
    await Promise.all(state.views.map((view) => fetchView(view)));
    if (ticket !== asked) return;
    draw();
    requestAnimationFrame(() => setTimeout(() => { document.body.dataset.shown = number; }));
    if (state.views.length === 1) prepare(number, ticket);
  } catch (error) {
    if (ticket === asked) say(`Image cannot be shown: ${error.message}`, true);
  }
}

async function prepare(number, ticket) { // the next images, while this one is looked at
  for (let more = 1; more <= AHEAD && number + more < state.images.length; more++) {
    const found = await pixels(number + more).catch(() => null);
    await new Promise((resolve) => requestIdleCallback(resolve, { timeout: 500 }));
    if (ticket !== asked) return;
    if (found) shaded(found, look);
  }
}

function show(number, image) {
  Object.assign(state, { number, image, active: 0 });
  state.images[number].version = Math.max(state.images[number].version, image.version);
  $("stage").replaceChildren();
  $("stage").classList.toggle("volume", image.panes.length > 1);
  document.body.classList.toggle("is-volume", image.panes.length > 1);
  state.views = image.panes.map((plan) => new View($("stage"), plan, image));
  for (const view of state.views) { view.look = look; listen(view); view.resize(); }
  image.landmarks.forEach(local);
  state.chosen = mostDoubtful() ?? 0;
  follow();
  say("");
  describe();
  location.replace(`#${number + 1}`);
}

function local(landmark, number) { // a change that is on its way already counts here
  for (const change of queue) {
    if (change.number === state.number && change.landmark === number) foresee(landmark, change);
  }
}

function foresee(landmark, { action, to }) {
  if (action === "move") Object.assign(landmark, { at: to, state: "labelled" });
  if (action === "absent" || action === "reset") Object.assign(landmark, { at: null, state: action === "reset" ? "open" : action });
  if (action === "accept" && landmark.state === "open" && landmark.predicted) {
    Object.assign(landmark, { at: landmark.predicted, state: "labelled" });
  }
}

async function fetchView(view) {
  const number = state.number, at = view.at;
  const found = await pixels(number, view);
  if (state.views.includes(view) && view.at === at && view.shown !== found) { view.take(found); view.shown = found; }
}

function follow() { // volumes: slices through the chosen landmark
  const landmark = state.image.landmarks[state.chosen], point = landmark && placeOf(landmark);
  for (const view of state.views) {
    if (view.fixed !== null) {
      const last = state.image.size[view.fixed] - 1;
      cut(view, point ? Math.min(last, Math.max(0, Math.round(point[view.fixed]))) : Math.round(last / 2));
    }
  }
}

function cut(view, at) {
  if (view.at === at && view.shown) return;
  view.at = at;
  fetchView(view).then(draw).catch((error) => say(error.message, true));
}

let drawing = false;
function draw() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => { drawing = false; for (const view of state.views) view.draw(state); });
}

function describe() {
  const { image, number } = state, brief = state.images[number];
  brief.open = image.landmarks.filter((each) => each.state === "open").length;
  $("name").textContent = document.title = image.id;
  $("place").textContent = `${number + 1} of ${state.images.length}`;
  $("doubt").textContent = brief.doubt === null ? "" : `expected error ${brief.doubt.toFixed(1)} ${brief.unit}${state.calibrated ? "" : ", not calibrated"}`;
  $("count").textContent = brief.open ? `${brief.open} of ${image.landmarks.length} open` : "all looked at";
  listImages();
  listLandmarks();
  const landmark = image.landmarks[state.chosen];
  $("confirm").disabled = landmark.state !== "open";
  $("absent").disabled = landmark.state === "absent";
  $("reset").disabled = landmark.state === "open";
  $("undo").disabled = !image.undo && !queue.length;
  $("redo").disabled = !image.redo;
  $("previous").disabled = number === 0;
  $("next").disabled = number === state.images.length - 1;
  state.views.forEach((view, index) => view.box.classList.toggle("active", state.views.length > 1 && index === state.active));
  draw();
}

// ---- the two lists: one stop of the Tab key each, arrow keys within

function fill(list, entries, chosen, choose) {
  while (list.children.length < entries.length) {
    const node = list.appendChild(document.createElement("li")), index = list.children.length - 1;
    node.append(document.createElement("b"), document.createElement("i"));
    node.setAttribute("role", "option");
    node.id = `${list.id}-${index}`;
    node.addEventListener("click", () => choose(index));
  }
  entries.forEach(({ text, more, kind, spoken }, index) => {
    const node = list.children[index], selected = index === chosen, said = [text, more, kind, spoken, selected].join("\n");
    if (node.said === said) return; // of a thousand images two or three differ
    node.said = said;
    if (node.firstChild.textContent !== text) { node.firstChild.textContent = text; node.title = text; }
    if (node.lastChild.textContent !== more) node.lastChild.textContent = more;
    if (node.dataset.state !== kind) { node.dataset.state = kind; }
    const label = `${text}, ${spoken}`;
    if (node.getAttribute("aria-label") !== label) node.setAttribute("aria-label", label);
    if (node.getAttribute("aria-selected") !== String(selected)) {
      node.setAttribute("aria-selected", selected);
      node.tabIndex = selected ? 0 : -1;
      if (selected) {
        node.scrollIntoView({ block: "nearest" });
        if (list.contains(document.activeElement)) node.focus();
      }
    }
  });
}

function listImages() {
  const total = state.image.landmarks.length;
  fill($("images"), state.images.map(({ id, doubt, unit, open: left }) => ({
    text: id, more: doubt === null ? "" : `${doubt.toFixed(1)} ${unit}`,
    kind: left === 0 ? "done" : left === total ? "open" : "part",
    spoken: left === 0 ? "all looked at" : `${left} of ${total} open`,
  })), state.number, open);
}

function listLandmarks() {
  const unit = state.images[state.number].unit;
  fill($("landmarks"), state.image.landmarks.map(({ name, state: kind, expected, radius90 }) => ({
    text: name, kind, spoken: kind,
    more: radius90 === undefined ? (expected === null ? "" : `${expected.toFixed(1)} ${unit}`) : `± ${radius90.toFixed(1)} ${unit}`,
  })), state.chosen, choose);
}

function choose(landmark) {
  const count = state.image.landmarks.length;
  state.chosen = (landmark + count) % count;
  follow();
  reveal();
  describe();
}

function reveal() { // a landmark that is chosen by key or in the list is brought into the view
  const point = placeOf(state.image.landmarks[state.chosen]);
  for (const view of point ? state.views : []) {
    const [x, y] = view.toScreen(point);
    if (x < 10 || y < 10 || x > view.width - 10 || y > view.height - 10) view.centreOn(point);
  }
}

function mostDoubtful() {
  let best = null;
  state.image.landmarks.forEach((each, number) => {
    if (each.state !== "open") return;
    if (best === null || (each.expected ?? 0) > (state.image.landmarks[best].expected ?? 0)) best = number;
  });
  return best;
}

// ---- changes

function change(action, landmark = null, to = null) {
  const number = state.number, last = queue.at(-1);
  if (landmark === null) {
    if (action === "accept") state.image.landmarks.forEach((each) => foresee(each, { action }));
  } else {
    foresee(state.image.landmarks[landmark], { action, to });
  }
  if (action === "move" && last && !last.sent && last.number === number && last.action === action && last.landmark === landmark) {
    last.to = to;
  } else {
    queue.push({ number, action, landmark, to, change: crypto.randomUUID() });
  }
  document.body.dataset.pending = queue.length;
  $("saved").textContent = "saving";
  describe();
  send();
}

async function send() {
  if (sending) return;
  sending = true;
  while (queue.length) {
    const next = queue[0], brief = state.images[next.number];
    next.sent = true;
    try {
      const { number, action, landmark, to, change: id } = next;
      const { status, values } = await ask(`change/${number}`, { version: brief.version, action, landmark, to, change: id });
      if (status === 200) queue.shift();
      else for (let index = queue.length - 1; index >= 0; index--) if (queue[index].number === number) queue.splice(index, 1);
      if (values.version === undefined) { // refused: what is on disk is what counts
        await refresh(number);
        say(values.message ?? `Not saved (status ${status})`, true);
        continue;
      }
      settle(number, values);
      if (status === 409) say(values.message, true);
      else if ($("message").dataset.lost) { delete $("message").dataset.lost; say("Saved: the program answers again."); }
    } catch {
      $("message").dataset.lost = "1";
      say("Not saved yet: the program does not answer. Start it again; this tab goes on trying.", true);
      await new Promise((resolve) => setTimeout(resolve, 700));
    }
  }
  sending = false;
  document.body.dataset.pending = 0;
  $("saved").textContent = `saved ${new Date().toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" })}`;
}

function settle(number, values) { // what the program says of an image
  Object.assign(state.images[number], { version: values.version, open: values.open });
  if (number === state.number) {
    for (const key of ["version", "undo", "redo"]) state.image[key] = values[key];
    if (!queue.some((each) => each.number === number)) {
      const moved = state.dragging;
      values.landmarks.forEach((each, index) => index !== moved && Object.assign(state.image.landmarks[index], each));
    }
    describe();
  } else {
    listImages();
  }
}

async function refresh(number = state.number) {
  try {
    settle(number, (await ask(`image/${number}`)).values);
  } catch { /* said where changes are sent */ }
}

async function acceptAll() {
  change("accept");
  const count = state.images.length, from = state.number;
  for (let step = 1; step < count; step++) {
    const number = (from + step) % count;
    if (state.images[number].open) return open(number);
  }
  say(state.image.landmarks.some((each) => each.state === "open") ? "Some landmarks are predicted outside the image and stay open."
    : "Every landmark of every image has been looked at.");
}

function confirm() {
  if (state.image.landmarks[state.chosen].state === "open") change("accept", state.chosen);
  const next = mostDoubtful();
  if (next !== null) choose(next);
  else say("All landmarks of this image have been looked at; N: next image.");
}

function move(right, down, through = 0) {
  const landmark = state.image.landmarks[state.chosen], view = state.views[state.active];
  const from = placeOf(landmark) ?? state.image.size.map((length) => (length - 1) / 2);
  const to = view.nudged(from, right, down, through).map((value) => Math.round(value * 1000) / 1000);
  change("move", state.chosen, to);
  follow();
  reveal();
}

// ---- the pointer

function listen(view) {
  const box = view.box;
  const place = (event) => { const { left, top } = box.getBoundingClientRect(); return [event.clientX - left, event.clientY - top]; };
  let drag = null;
  box.addEventListener("pointerdown", (event) => {
    const [x, y] = place(event), landmark = event.button === 0 ? view.grabbed(x, y, state.chosen) : null;
    state.active = state.views.indexOf(view);
    if (landmark !== null) { state.chosen = landmark; say(""); }
    drag = { x, y, lastX: x, lastY: y, landmark, shade: event.button === 2, moved: false };
    box.setPointerCapture(event.pointerId);
    $("stage").focus({ preventScroll: true });
    describe();
    event.preventDefault();
  });
  box.addEventListener("pointermove", (event) => {
    if (!drag) return;
    const [x, y] = place(event);
    drag.moved ||= Math.hypot(x - drag.x, y - drag.y) >= 1;
    if (!drag.moved) return;
    if (drag.shade) {
      shade(look.brightness - (y - drag.lastY) / 400, look.contrast + (x - drag.lastX) / 400);
    } else if (drag.landmark !== null) {
      const landmark = state.image.landmarks[drag.landmark];
      state.dragging = drag.landmark;
      Object.assign(landmark, { at: view.toImage(x, y, placeOf(landmark)), state: "labelled" });
      for (const other of state.views.filter((each) => each !== view)) cut(other, Math.round(landmark.at[other.fixed]));
    } else {
      box.classList.add("panning");
      view.pan(x - drag.lastX, y - drag.lastY);
    }
    drag.lastX = x;
    drag.lastY = y;
    draw();
  });
  const end = (event) => {
    if (!drag) return;
    const { landmark, moved, shade: shading } = drag, [x, y] = place(event);
    drag = null;
    delete state.dragging;
    box.classList.remove("panning");
    if (moved && landmark !== null && !shading) {
      const to = view.toImage(x, y, placeOf(state.image.landmarks[landmark])).map((value) => Math.round(value * 1000) / 1000);
      change("move", landmark, to);
      follow();
    } else if (landmark !== null) {
      follow();
    }
  };
  box.addEventListener("pointerup", end);
  box.addEventListener("pointercancel", end);
  box.addEventListener("contextmenu", (event) => event.preventDefault());
  box.addEventListener("dblclick", (event) => {
    const [x, y] = place(event);
    if (view.grabbed(x, y, state.chosen) !== null) return;
    change("move", state.chosen, view.toImage(x, y, placeOf(state.image.landmarks[state.chosen])).map((v) => Math.round(v * 1000) / 1000));
    follow();
  });
  box.addEventListener("wheel", (event) => {
    event.preventDefault();
    const turn = (event.deltaY || event.deltaX) * (event.deltaMode === 1 ? 24 : 1);
    if (event.shiftKey && view.fixed !== null) {
      cut(view, Math.min(state.image.size[view.fixed] - 1, Math.max(0, view.at + Math.sign(turn))));
    } else {
      view.zoom(Math.exp(-turn * 0.0015), ...place(event));
    }
    draw();
  }, { passive: false });
}

function shade(brightness, contrast) {
  look.brightness = Math.min(1, Math.max(-1, brightness));
  look.contrast = Math.min(1, Math.max(-1, contrast));
  $("brightness").value = look.brightness;
  $("contrast").value = look.contrast;
  for (const view of state.views) view.shade(look);
  draw();
}

// ---- the keyboard

function zoom(factor) {
  const view = state.views[state.active], point = placeOf(state.image.landmarks[state.chosen]);
  const [x, y] = point ? view.toScreen(point) : [view.width / 2, view.height / 2];
  const seen = x >= 0 && y >= 0 && x <= view.width && y <= view.height;
  view.zoom(factor, ...(seen ? [x, y] : [view.width / 2, view.height / 2]));
  draw();
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const KEYS = {
  n: () => open(state.number + 1),
  p: () => open(state.number - 1),
  a: acceptAll,
  Enter: confirm,
  x: () => change("absent", state.chosen),
  r: () => change("reset", state.chosen),
  z: (event) => change(event.shiftKey ? "redo" : "undo"),
  y: () => change("redo"),
  ".": () => choose(state.chosen + 1),
  ",": () => choose(state.chosen - 1),
  "+": () => zoom(1.25),
  "=": () => zoom(1.25),
  "-": () => zoom(0.8),
  0: () => { for (const view of state.views) view.fit(); draw(); },
  f: () => { const point = placeOf(state.image.landmarks[state.chosen]); if (point) for (const view of state.views) view.centreOn(point); draw(); },
  b: (event) => shade(look.brightness + (event.shiftKey ? -0.05 : 0.05), look.contrast),
  c: (event) => shade(look.brightness, look.contrast + (event.shiftKey ? -0.05 : 0.05)),
  v: () => shade(0, 0),
  l: () => { state.names = !state.names; draw(); },
  t: () => { state.active = (state.active + 1) % state.views.length; describe(); },
};
KEYS.Delete = KEYS.x;

document.addEventListener("keydown", (event) => {
  if (!state.image || event.altKey || event.metaKey) return;
  const { target } = event, key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const list = target.closest?.("ul"), pressed = target.matches?.("button, summary");
  if (target.type === "range" && (ARROWS[key] || key.startsWith("Page") || key === "Home" || key === "End")) return;
  if (pressed && (key === "Enter" || key === " ")) return;
  if (list && (key === "ArrowUp" || key === "ArrowDown" || key === "Home" || key === "End")) {
    const last = list.children.length - 1, at = list === $("images") ? state.number : state.chosen;
    const to = { ArrowUp: Math.max(0, at - 1), ArrowDown: Math.min(last, at + 1), Home: 0, End: last }[key];
    (list === $("images") ? open : choose)(to);
  } else if (ARROWS[key]) {
    const step = event.ctrlKey ? 0.1 : event.shiftKey ? 10 : 1;
    move(...ARROWS[key].map((each) => each * step));
  } else if (key === "PageUp" || key === "PageDown") {
    if (state.views.length === 1) return;
    move(0, 0, key === "PageUp" ? 1 : -1);
  } else if (KEYS[key] && !(event.ctrlKey && key !== "z" && key !== "y")) {
    KEYS[key](event);
  } else {
    return;
  }
  event.preventDefault();
});

// ---- beginning

for (const [id, key] of Object.entries({ previous: "p", next: "n", accept: "a", confirm: "Enter", absent: "x", reset: "r", undo: "z", redo: "y" })) {
  $(id).addEventListener("click", (event) => { KEYS[key](event); });
}
for (const id of ["brightness", "contrast"]) {
  $(id).addEventListener("input", () => shade(Number($("brightness").value), Number($("contrast").value)));
}
new ResizeObserver(() => { for (const view of state.views) view.resize(); draw(); }).observe($("stage"));
document.addEventListener("visibilitychange", () => { if (!document.hidden && state.image && !queue.length) refresh(); });
window.addEventListener("focus", () => { if (state.image && !queue.length) refresh(); });
window.addEventListener("beforeunload", (event) => { if (queue.length) event.preventDefault(); });

ask("state").then(({ values }) => {
  Object.assign(state, { images: values.images, calibrated: values.calibrated });
  $("train").textContent = values.train;
  const wanted = Number(location.hash.slice(1)) - 1;
  open(wanted > 0 && wanted < state.images.length ? wanted : 0);
}).catch(() => say("The program does not answer.", true));
