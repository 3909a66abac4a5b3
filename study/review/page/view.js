// One view of an image: the whole of a flat one, or a slice of a volume. It knows where pixels are on the screen.
// Points are [x, y(, z)] in stored pixels, the centre of the first one at 0. Screen places are CSS pixels of the view.

const SVG = "http://www.w3.org/2000/svg";
const MOST = 64, LEAST = 0.25; // CSS pixels of a pixel; share of the scale at which the image fits
const REACH = 14; // CSS pixels within which a point is grabbed

export function svg(name, attributes = {}, parent = null) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  parent?.append(node);
  return node;
}

export class View {
  constructor(stage, plan, image) {
    Object.assign(this, plan); // fixed, across, down, flip_across, flip_down, name
    this.image = image;
    this.columns = image.size[this.across];
    this.rows = image.size[this.down];
    const unit = Math.min(...image.spacing);
    this.stepX = image.spacing[this.across] / unit;
    this.stepY = image.spacing[this.down] / unit;
    this.at = 0; // the slice
    this.fits = true;
    this.box = document.createElement("div");
    this.box.className = "pane";
    this.canvas = document.createElement("canvas");
    this.overlay = svg("svg", { "aria-hidden": "true" });
    this.label = document.createElement("span");
    this.label.className = "name";
    this.box.append(this.canvas, this.overlay, this.label);
    stage.append(this.box);
    this.pixels = this.source = null;
  }

  get turned() { return this.down < this.across; } // the rows of its pixels are the later axis

  resize() {
    const { width, height } = this.box.getBoundingClientRect();
    const density = window.devicePixelRatio || 1;
    const middle = this.fits || !this.width ? null : [this.toColumn(this.width / 2), this.toRow(this.height / 2)];
    this.width = width;
    this.height = height;
    this.canvas.width = Math.round(width * density);
    this.canvas.height = Math.round(height * density);
    if (middle) this.centre(...middle);
    else this.fit();
  }

  fit() {
    this.fits = true;
    this.scale = this.fitting();
    this.centre((this.columns - 1) / 2, (this.rows - 1) / 2);
  }

  fitting() {
    return Math.min(this.width / (this.columns * this.stepX), this.height / (this.rows * this.stepY));
  }

  centre(column, row) { // the pixel that the middle of the view shows, counted as it is drawn
    this.left = this.width / 2 - (column + 0.5) * this.stepX * this.scale;
    this.top = this.height / 2 - (row + 0.5) * this.stepY * this.scale;
  }

  centreOn(point) { this.centre(this.column(point), this.row(point)); this.fits = false; }

  zoom(factor, x, y) { // about the place x, y of the view
    const scale = Math.min(MOST, Math.max(this.fitting() * LEAST, this.scale * factor));
    this.left = x - (x - this.left) * scale / this.scale;
    this.top = y - (y - this.top) * scale / this.scale;
    this.scale = scale;
    this.fits = false;
  }

  pan(x, y) { this.left += x; this.top += y; this.fits = false; }

  column(point) { return this.flip_across ? this.columns - 1 - point[this.across] : point[this.across]; }
  row(point) { return this.flip_down ? this.rows - 1 - point[this.down] : point[this.down]; }
  toColumn(x) { return (x - this.left) / (this.stepX * this.scale) - 0.5; }
  toRow(y) { return (y - this.top) / (this.stepY * this.scale) - 0.5; }

  toScreen(point) {
    return [this.left + (this.column(point) + 0.5) * this.stepX * this.scale,
            this.top + (this.row(point) + 0.5) * this.stepY * this.scale];
  }

  toImage(x, y, from) { // the point at a place of the view, within the image; of a volume in the slice that is shown
    const column = this.toColumn(x), row = this.toRow(y), point = from ? [...from] : this.image.size.map(() => 0);
    point[this.across] = this.flip_across ? this.columns - 1 - column : column;
    point[this.down] = this.flip_down ? this.rows - 1 - row : row;
    if (this.fixed !== null && Math.round(point[this.fixed]) !== this.at) point[this.fixed] = this.at;
    return inside(point, this.image.size);
  }

  nudged(point, right, down, through) { // moved by pixels as they are seen
    const next = [...point];
    next[this.across] += this.flip_across ? -right : right;
    next[this.down] += this.flip_down ? -down : down;
    if (this.fixed !== null) next[this.fixed] += through;
    return inside(next, this.image.size);
  }

  // 1 in the slice that is shown, less the farther away, 0 where nothing of the point's circle reaches it
  nearness(point, radius) {
    if (this.fixed === null) return 1;
    const away = Math.abs(point[this.fixed] - this.at), reach = Math.max(radius?.[this.fixed] ?? 0, 0.5);
    if (away <= 0.5) return 1;
    return away >= reach ? 0 : Math.sqrt(1 - (away / reach) ** 2);
  }

  grabbed(x, y, chosen) { // the landmark at a place, the chosen one before others
    let best = null, least = REACH;
    this.image.landmarks.forEach((landmark, number) => {
      const point = placeOf(landmark);
      if (!point || landmark.state === "absent" || !this.nearness(point, landmark.radius)) return;
      const [px, py] = this.toScreen(point);
      const distance = Math.hypot(px - x, py - y) - (number === chosen ? 4 : 0);
      if (distance < least) { least = distance; best = number; }
    });
    return best;
  }

  take(pixels) { this.pixels = pixels; this.shade(); }

  shade(look = this.look) {
    this.look = look;
    if (this.pixels) this.source = shaded(this.pixels, look);
  }

  draw(state) {
    const density = this.canvas.width / this.width, context = this.canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.fillStyle = "#000";
    context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    if (this.source) {
      const x = this.stepX * this.scale, y = this.stepY * this.scale;
      context.setTransform(density * x * (this.flip_across ? -1 : 1), 0, 0, density * y * (this.flip_down ? -1 : 1),
        density * (this.left + (this.flip_across ? this.columns * x : 0)),
        density * (this.top + (this.flip_down ? this.rows * y : 0)));
      context.imageSmoothingEnabled = density * Math.min(x, y) < 2;
      context.imageSmoothingQuality = "medium";
      context.drawImage(this.source, 0, 0);
    }
    this.label.textContent = this.fixed === null ? "" :
      `${this.name}, ${"xyz"[this.fixed]} ${this.at} of ${this.image.size[this.fixed] - 1}`;
    this.overlay.replaceChildren();
    if (this.fixed !== null) this.drawSlices(state.views);
    this.image.landmarks.forEach((landmark, number) => number !== state.chosen && this.drawPoint(landmark, number, state));
    if (this.image.landmarks[state.chosen]) this.drawPoint(this.image.landmarks[state.chosen], state.chosen, state);
  }

  drawSlices(views) { // where the other views cut
    for (const other of views.filter((each) => each !== this)) {
      const point = this.image.size.map(() => 0);
      point[other.fixed] = other.at;
      const [x, y] = this.toScreen(point);
      const line = other.fixed === this.across ? { x1: x, x2: x, y1: 0, y2: this.height }
        : { x1: 0, x2: this.width, y1: y, y2: y };
      svg("line", { ...line, class: "slice" }, this.overlay);
    }
  }

  drawPoint(landmark, number, state) {
    const point = placeOf(landmark), near = point ? this.nearness(point, landmark.radius) : 0, chosen = number === state.chosen;
    if (!near && !chosen) return;
    if (!point) return;
    const [x, y] = this.toScreen(point);
    const group = svg("g", { "data-state": landmark.state, "data-landmark": number }, this.overlay);
    group.classList.toggle("chosen", chosen);
    group.classList.toggle("away", near < 1);
    if (landmark.predicted && landmark.at && this.nearness(landmark.predicted, landmark.radius)) {
      const [px, py] = this.toScreen(landmark.predicted);
      if (Math.hypot(px - x, py - y) > 2) {
        svg("path", { d: `M${px - 3} ${py - 3}l6 6m0 -6l-6 6M${px} ${py}L${x} ${y}`, class: "ghost" }, group);
      }
    }
    if (landmark.radius && landmark.predicted && landmark.state !== "absent") {
      const [px, py] = this.toScreen(landmark.predicted), cut = this.nearness(landmark.predicted, landmark.radius);
      const size = { rx: landmark.radius[this.across] * this.stepX * this.scale * cut,
                     ry: landmark.radius[this.down] * this.stepY * this.scale * cut };
      if (cut) svg("ellipse", { cx: px, cy: py, ...size, class: "radius" }, group);
    }
    const path = landmark.state === "absent" ? `M${x - 6} ${y - 6}l12 12m0 -12l-12 12`
      : `M${x - 9} ${y}h6m6 0h6M${x} ${y - 9}v6m0 6v6`;
    svg("path", { d: path, class: "halo" }, group);
    svg("path", { d: path, class: "mark" }, group);
    if (landmark.state !== "absent") svg("circle", { cx: x, cy: y, r: 5.5, class: "mark place" }, group);
    if (chosen || state.names) {
      const before = x + 12 + 7.5 * landmark.name.length > this.width; // there is no room behind the point
      svg("text", { x: before ? x - 12 : x + 12, y: y - 9, "text-anchor": before ? "end" : "start" }, group)
        .textContent = landmark.name;
    }
  }
}

// A canvas of the grey values through the window, made of the numbers of the file; kept with them while the look stays.
export function shaded(pixels, { brightness, contrast }) {
  const { values, rows, columns, bytes, window: [low, high] } = pixels, look = `${brightness} ${contrast}`;
  if (pixels.look === look) return pixels.canvas;
  pixels.canvas ??= Object.assign(document.createElement("canvas"), { width: columns, height: rows });
  const context = pixels.canvas.getContext("2d"), data = context.createImageData(columns, rows);
  const table = shades(bytes, low, high, { brightness, contrast }), out = new Uint32Array(data.data.buffer);
  for (let index = 0; index < out.length; index++) out[index] = table[values[index]];
  context.putImageData(data, 0, 0);
  pixels.look = look;
  return pixels.canvas;
}

export function placeOf(landmark) { return landmark.at ?? landmark.predicted; }

function inside(point, size) {
  return point.map((value, axis) => Math.min(size[axis] - 0.5, Math.max(-0.5, value)));
}

function shades(bytes, low, high, { brightness, contrast }) { // every stored value -> an opaque grey, as RGBA
  const width = (high - low) * 4 ** -contrast, middle = (low + high) / 2 - brightness * (high - low);
  const table = new Uint32Array(bytes === 1 ? 256 : 65536), first = middle - width / 2;
  for (let value = 0; value < table.length; value++) {
    const grey = Math.min(255, Math.max(0, Math.round((value - first) / width * 255)));
    table[value] = (0xff000000 | grey << 16 | grey << 8 | grey) >>> 0;
  }
  return table;
}
