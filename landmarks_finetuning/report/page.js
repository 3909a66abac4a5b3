"use strict";
// The report's controls. Everything is in the page without them: this sorts, hides, draws the error curves and opens
// pictures. What is chosen is kept in the address behind the #, so that a copied address shows the same view:
//   data, start, labels   the filters, each as often as there are values; none: all
//   sort                  <table>:<column>:asc|desc, for each table that is not in its own order
//   curve, hide           the curves' number of labels; methods that are not drawn
//   row                   the row of a results table whose pictures are open
//   at                    the part of the page a link led to
const FILTERS = ["data", "start", "labels"];
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

/** A new element with attributes, and children that are elements or text: nothing is ever parsed as HTML. */
function element(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "line", "text", "circle"].includes(tag);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// ---- the state -----------------------------------------------------------------------------------------------------
const state = { data: new Set(), start: new Set(), labels: new Set(), hide: new Set(), sort: new Map(),
                curve: null, row: null, at: null };

function readState() {
  const text = location.hash.slice(1);
  const found = new URLSearchParams(text.includes("=") ? text : "");  // without one it is the id of a place
  for (const name of FILTERS) {
    const known = all(`#filters input[name=${name}]`).map(input => input.value);
    state[name] = new Set(found.getAll(name).filter(value => known.includes(value)));
  }
  state.hide = new Set(found.getAll("hide"));
  state.sort = new Map();
  for (const entry of found.getAll("sort")) {
    const parts = entry.split(":"), direction = parts.pop(), column = parts.pop();
    if (parts.length && ["asc", "desc"].includes(direction)) state.sort.set(parts.join(":"), { column, direction });
  }
  for (const name of ["curve", "row", "at"]) state[name] = found.get(name);
}

function writeState() {
  const found = new URLSearchParams();
  for (const name of [...FILTERS, "hide"]) for (const value of state[name]) found.append(name, value);
  for (const [table, { column, direction }] of state.sort) found.append("sort", `${table}:${column}:${direction}`);
  for (const name of ["curve", "row", "at"]) if (state[name] !== null) found.append(name, state[name]);
  history.replaceState(null, "", `#${found}`);
}

/** Show the state, after a change of it. */
function show() {
  showFilters();
  for (const table of all("table.sortable")) showSort(table);
  for (const chart of charts) chart.draw();
  showPictures();
}

function change(edit) {
  edit();
  writeState();
  show();
}

function toggle(set, value) {
  if (!set.delete(value)) set.add(value);
}

const filtered = () => FILTERS.some(name => state[name].size);
const passes = (name, value) => !state[name].size || state[name].has(value);

// ---- filters -------------------------------------------------------------------------------------------------------
/** A comparison has two starts: with two or more chosen both must be among them, with one chosen either. */
function isShown(item) {
  const { start, rival, labels, sets } = item.dataset;
  if (sets && state.data.size && !JSON.parse(sets).some(name => state.data.has(name))) return false;
  const starts = [start, rival].filter(value => value !== undefined);
  const chosen = starts.filter(value => state.start.has(value)).length;
  const needed = Math.min(starts.length, state.start.size);
  return chosen >= needed && (labels === "any" || passes("labels", labels));
}

function showFilters() {
  for (const input of all("#filters input")) input.checked = state[input.name].has(input.value);
  for (const part of all("[data-data]")) part.hidden = !passes("data", part.dataset.data);
  for (const item of all("[data-labels]")) item.hidden = !isShown(item);
  for (const part of all(".paper")) part.hidden = all("tr[data-labels]", part).every(row => row.hidden);
  const rows = all(".results tr[data-labels]");
  const shown = rows.filter(row => !row.closest("[hidden]")).length;
  document.getElementById("status").textContent = `${filtered() ? "Filtered: " : ""}${shown} of ${rows.length} results`;
  document.body.classList.toggle("filtered", filtered());
}

function prepareFilters() {
  const form = document.getElementById("filters");
  form.hidden = !all(".results tr[data-labels]").length;  // predictions without a score have nothing to choose from
  form.onsubmit = () => false;
  form.onchange = event => change(() => toggle(state[event.target.name], event.target.value));
  document.getElementById("reset").onclick = () => change(() => {
    for (const name of [...FILTERS, "hide"]) state[name] = new Set();
    Object.assign(state, { sort: new Map(), curve: null, row: null });
  });
}

// ---- sorting -------------------------------------------------------------------------------------------------------
/** The headings that name one column each: the last row of the head. */
const headings = table => [...table.tHead.rows[table.tHead.rows.length - 1].cells];

/** What a cell sorts by: its first number ("1.20 to 1.90" is 1.20, "< 0.001" just below 0.001), or its text. */
function sortValue(cell, isText) {
  const text = cell.textContent.trim().replace(/\u2212/g, "-");
  if (text === "" || text === "\u2013") return null;
  if (isText) return text;
  const found = text.match(/[-+]?\d*\.?\d+/);
  return found ? Number(found[0]) * (text.startsWith("<") ? 0.999 : 1) : null;
}

/** Rows in the order of a column; equal ones keep their order, empty ones come last either way. */
function ordered(rows, index, isText, direction) {
  const sign = direction === "asc" ? 1 : -1, keyed = rows.map(row => ({ row, value: sortValue(row.cells[index], isText) }));
  return keyed.sort((a, b) => {
    if (a.value === null || b.value === null) return (a.value === null) - (b.value === null);
    return sign * (isText ? a.value.localeCompare(b.value, undefined, { numeric: true }) : a.value - b.value);
  }).map(({ row }) => row);
}

function showSort(table) {
  const chosen = state.sort.get(table.id);
  const index = headings(table).findIndex(heading => chosen && heading.dataset.column === chosen.column);
  headings(table).forEach((heading, place) => {
    if (place === index) heading.setAttribute("aria-sort", chosen.direction === "asc" ? "ascending" : "descending");
    else heading.removeAttribute("aria-sort");
  });
  table.classList.toggle("sorted", index >= 0);
  const free = table.rowsInOrder.filter(row => !row.classList.contains("fixed"));
  const rows = index < 0 ? free : ordered(free, index, headings(table)[index].classList.contains("text"), chosen.direction);
  table.tBodies[0].append(...rows, ...table.rowsInOrder.filter(row => row.classList.contains("fixed")));
}

/** A heading's click: smallest first, largest first, the table's own order. */
function nextSort(table, column) {
  const chosen = state.sort.get(table.id);
  state.sort.delete(table.id);
  if (!chosen || chosen.column !== column) state.sort.set(table.id, { column, direction: "asc" });
  else if (chosen.direction === "asc") state.sort.set(table.id, { column, direction: "desc" });
}

function prepareSorting(table) {
  table.rowsInOrder = [...table.tBodies[0].rows];
  const taken = new Set();
  for (const heading of headings(table)) {
    const name = heading.textContent.toLowerCase().replace(/[^\p{L}\p{N}.]+/gu, "") || "column";
    let column = name;
    for (let count = 2; taken.has(column); count++) column = `${name}-${count}`;
    taken.add(column);
    heading.dataset.column = column;
    const button = element("button", { type: "button", class: "sort" }, ...heading.childNodes);
    button.onclick = () => change(() => nextSort(table, column));
    heading.append(button);
  }
}

// ---- tables wider than their place -------------------------------------------------------------------------------
/** A word above a table that is cut, and a fading edge until its end is in sight; keys scroll it, too. */
function prepareScroll(box) {
  const hint = element("p", { class: "soft hint" }, "more columns: scroll sideways →");
  hint.hidden = true;
  box.before(hint);
  const look = () => {
    const cut = box.scrollWidth > box.clientWidth + 1;
    hint.hidden = !cut;
    box.classList.toggle("more", cut && box.scrollLeft + box.clientWidth < box.scrollWidth - 1);
    if (cut) { box.tabIndex = 0; box.setAttribute("role", "region"); box.setAttribute("aria-label", "Table, scrolls sideways"); }
  };
  box.addEventListener("scroll", look, { passive: true });
  new ResizeObserver(look).observe(box);
}

// ---- the pictures of a row -----------------------------------------------------------------------------------------
/** The row below a result with its run's pictures, copied from the worst cases, or the reason why there are none. */
function picturesRow(row) {
  const box = element("div", { class: "opened", role: "region", "aria-label": "Pictures of this run" });
  const source = row.dataset.cases && document.getElementById(row.dataset.cases);
  if (source) {
    box.append(element("p", {}, element("b", {}, source.querySelector("summary").textContent), ": worst images first"));
    box.append(...[...source.children].slice(1).map(child => child.cloneNode(true)));
  } else {
    box.append(element("p", {}, row.dataset.missing));
  }
  return element("tr", { class: "detail" }, element("td", { colspan: row.cells.length }, box));
}

function showPictures() {
  for (const detail of all("tr.detail")) detail.remove();
  for (const row of all(".results tr[data-row]")) {
    const open = row.dataset.row === state.row && !row.hidden;
    row.classList.toggle("open", open);
    row.querySelector("button").setAttribute("aria-expanded", open);
    if (open) row.after(picturesRow(row));
  }
}

function prepareRow(row) {
  const cell = row.querySelector("td.text");
  cell.append(element("button", { type: "button", class: "opener" }, ...cell.childNodes));
  row.title = "Show the pictures of this run";
  row.onclick = () => change(() => { state.row = state.row === row.dataset.row ? null : row.dataset.row; });
}

function prepareZoom() {
  const zoom = document.getElementById("zoom"), large = zoom.firstElementChild;
  const enlarge = small => { large.src = small.src; large.alt = small.alt; zoom.showModal(); };
  for (const picture of all(".pictures img")) { picture.tabIndex = 0; picture.setAttribute("role", "button"); }
  document.addEventListener("click", event => event.target.matches(".pictures img") && enlarge(event.target));
  document.addEventListener("keydown", event => {
    if (event.key === "Enter" && event.target.matches(".pictures img")) enlarge(event.target);
  });
  zoom.onclick = () => zoom.close();
}

// ---- error curves --------------------------------------------------------------------------------------------------
/** A step between grid lines, 1, 2 or 5 times a power of ten, that gives about `count` of them. */
function niceStep(reach, count) {
  const rough = reach / count, power = 10 ** Math.floor(Math.log10(rough));
  return power * ([1, 2, 5].find(factor => factor * power >= rough) || 10);
}

const plain = value => String(Number(value.toPrecision(3)));

class Chart {
  constructor(place) {
    this.place = place;
    this.data = JSON.parse(place.querySelector("script").textContent);
    const { distances, thresholds } = this.data;
    this.cursor = this.nearest(thresholds.length ? thresholds[0] : distances[distances.length - 1] / 4);
    this.tabs = element("div", { class: "chips", role: "group", "aria-label": "Number of labels" });
    this.stage = element("div", { class: "stage" });
    this.readout = element("p", { class: "readout" });
    this.legend = element("div", { class: "legend", role: "group", "aria-label": "Methods" });
    place.querySelector(".interactive").append(this.tabs, this.stage, this.readout, this.legend,
      element("p", { class: "soft" }, "Point at the curves, or use the arrow keys, to read them; select a method to hide it."));
    place.classList.add("live");
    new ResizeObserver(() => this.draw()).observe(this.stage);
  }

  nearest(distance) {
    const off = this.data.distances.map(each => Math.abs(each - distance));
    return off.indexOf(Math.min(...off));
  }

  /** The number of labels that is drawn: the chosen one, or the largest of those the filter leaves. */
  labels() {
    const known = this.data.panels.map(panel => panel.labels), left = known.filter(labels => passes("labels", labels));
    const possible = left.length ? left : known;
    return { possible, chosen: possible.includes(state.curve) ? state.curve : possible[possible.length - 1] };
  }

  draw() {
    const { possible, chosen } = this.labels();
    this.tabs.replaceChildren(...possible.map(labels => {
      const tab = element("button", { type: "button", "aria-pressed": labels === chosen }, labels === "1" ? "1 label" : `${labels} labels`);
      tab.onclick = () => change(() => { state.curve = labels; });
      return tab;
    }));
    const panel = this.data.panels.find(each => each.labels === chosen);
    this.curves = [...panel.curves.filter(curve => passes("start", curve.key)), ...this.data.reference];
    this.drawLegend();
    this.drawStage();
    this.point(this.cursor);
  }

  drawLegend() {
    const focused = document.activeElement && document.activeElement.dataset.key;
    this.values = new Map();
    this.legend.replaceChildren(...this.curves.map(curve => {
      const value = element("span", { class: "value" });
      this.values.set(curve, value);
      const entry = element("button", { type: "button", "data-key": curve.key, "aria-pressed": !state.hide.has(curve.key) },
        element("span", { class: "dot", style: `background:${curve.colour}` }), element("span", {}, curve.name), value);
      entry.onclick = () => change(() => toggle(state.hide, curve.key));
      return entry;
    }));
    const again = focused && [...this.legend.children].find(entry => entry.dataset.key === focused);
    if (again) again.focus();
  }

  drawStage() {
    const { distances, thresholds, unit } = this.data, reach = distances[distances.length - 1];
    const width = Math.max(280, this.stage.clientWidth), height = Math.min(430, Math.max(260, width * 0.5));
    const left = 42, right = width - 12, top = 12, bottom = height - 40;
    this.x = distance => left + (right - left) * distance / reach;
    this.y = percent => bottom - (bottom - top) * percent / 100;
    this.distanceAt = x => (x - left) / (right - left) * reach;
    const drawn = element("svg", { viewBox: `0 0 ${width} ${height}`, width, height, tabindex: 0, role: "img",
      "aria-label": "Percent of landmarks within a distance" });
    for (let percent = 0; percent <= 100; percent += 20) {
      drawn.append(element("line", { class: "grid", x1: left, x2: right, y1: this.y(percent), y2: this.y(percent) }),
        element("text", { x: left - 7, y: this.y(percent) + 4, "text-anchor": "end" }, `${percent}`));
    }
    const step = niceStep(reach, width / 80);
    for (let tick = 0; tick <= reach * 1.0001; tick += step) {
      drawn.append(element("text", { x: this.x(tick), y: bottom + 17, "text-anchor": "middle" }, plain(tick)));
    }
    drawn.append(element("text", { x: right, y: height - 5, "text-anchor": "end" }, `landmarks within (%), by distance (${unit})`));
    for (const limit of thresholds.filter(each => each <= reach)) {
      drawn.append(element("line", { class: "limit", x1: this.x(limit), x2: this.x(limit), y1: top, y2: bottom }));
    }
    for (const curve of this.curves.filter(each => !state.hide.has(each.key))) {
      const steps = curve.values.map((value, index) => `${index ? "L" : "M"}${this.x(distances[index]).toFixed(1)} ${this.y(value).toFixed(1)}`);
      drawn.append(element("path", { class: "curve", d: steps.join(""), stroke: curve.colour, "data-key": curve.key,
        "stroke-width": curve.thin ? 1 : 2, "stroke-dasharray": curve.dashed ? "6 4" : "none" }));
    }
    this.marks = element("g", { class: "marks", "data-top": top, "data-bottom": bottom });
    drawn.append(this.marks);
    drawn.onpointermove = drawn.onpointerdown = event =>
      this.point(this.nearest(this.distanceAt(event.clientX - drawn.getBoundingClientRect().left)));
    drawn.onkeydown = event => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (move) { this.point(this.cursor + move); event.preventDefault(); }
    };
    const hadFocus = this.stage.contains(document.activeElement);
    this.stage.replaceChildren(drawn);
    if (hadFocus) drawn.focus();
  }

  /** Mark one distance and write every method's share at it into the legend. */
  point(index) {
    const { distances, unit } = this.data;
    this.cursor = Math.max(0, Math.min(distances.length - 1, index));
    const x = this.x(distances[this.cursor]), { top, bottom } = this.marks.dataset;
    this.marks.replaceChildren(element("line", { x1: x, x2: x, y1: top, y2: bottom }));
    for (const curve of this.curves) {
      const value = curve.values[this.cursor], hidden = state.hide.has(curve.key);
      this.values.get(curve).textContent = `${value.toFixed(1)} %`;
      if (!hidden) this.marks.append(element("circle", { cx: x, cy: this.y(value), r: 4, fill: curve.colour }));
    }
    this.readout.textContent = `Within ${distances[this.cursor].toFixed(2)} ${unit}:`;
  }
}

// ---- start ---------------------------------------------------------------------------------------------------------
/** A link within the page leads to its place and keeps the state. */
function follow(event) {
  const link = event.target.closest("a[href^='#']");
  if (!link) return;
  event.preventDefault();
  state.at = decodeURIComponent(link.getAttribute("href").slice(1));
  writeState();
  document.getElementById(state.at).scrollIntoView();
}

function openForPrint() {
  const closed = all("details:not([open])").filter(part => part.querySelector("table"));
  for (const part of closed) part.open = true;
  window.addEventListener("afterprint", () => { for (const part of closed) part.open = false; }, { once: true });
}

const charts = all(".curves").map(place => new Chart(place));
prepareFilters();
all("table.sortable").forEach(prepareSorting);
all(".results tr[data-row]").forEach(prepareRow);
all(".scroll").forEach(prepareScroll);
prepareZoom();
document.addEventListener("click", follow);
window.addEventListener("beforeprint", openForPrint);
window.addEventListener("hashchange", () => { readState(); show(); });
readState();
show();
if (state.at && document.getElementById(state.at)) document.getElementById(state.at).scrollIntoView({ behavior: "instant" });
