"use strict";

/** An element with attributes and children; text is never read as HTML. */
function element(name, attributes = {}, ...children) {
  const isDrawn = ["svg", "g", "path", "line", "circle", "text"].includes(name);
  const made = isDrawn ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** Four significant digits. */
function short(value) {
  const size = Math.abs(value);
  return size !== 0 && (size >= 1e6 || size < 1e-3) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

/** Round values from low to high, about so many. */
function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-6; value += step) found.push(value);
  return found;
}

/** Round values of a logarithmic axis; low and high are powers of ten. */
function powers(low, high) {
  const found = [];
  for (let power = Math.floor(low); power <= high; power += 1) found.push(...[1, 2, 5].map((factor) => factor * 10 ** power));
  const inside = found.filter((value) => Math.log10(value) >= low && Math.log10(value) <= high);
  const tens = inside.filter((value) => Number.isInteger(Math.log10(value)));
  return inside.length > 7 && tens.length > 1 ? tens : inside;
}

/** One chart: its lines, and a cursor that the pointer or the arrow keys move from epoch to epoch. */
class Chart {
  static HEIGHT = 220;
  static EDGE = { left: 56, right: 12, top: 8, bottom: 34 };

  constructor(panel) {
    this.epoch = null;
    this.drawing = element("svg", { tabindex: "0", role: "slider", "aria-orientation": "horizontal" });
    this.legend = element("ul", { class: "legend" });
    const title = element("h3", {}, panel.title), note = element("p", { class: "note" }, panel.note);
    this.figure = element("figure", {}, title, note, this.drawing, this.legend);
    this.drawing.addEventListener("pointermove", (event) => this.point(event));
    this.drawing.addEventListener("pointerdown", (event) => this.point(event));
    this.drawing.addEventListener("pointerleave", () => this.choose(null));
    this.drawing.addEventListener("blur", () => this.choose(null));
    this.drawing.addEventListener("keydown", (event) => this.press(event));
    new ResizeObserver(() => this.draw()).observe(this.figure);
    this.update(panel);
  }

  update(panel) {
    this.panel = panel;
    const points = panel.series.flatMap((one) => [...one.points, ...(one.band ?? []).flatMap(
      ([low, high], index) => [[one.points[index][0], low], [one.points[index][0], high]])]);
    this.epochs = [...new Set(points.map(([x]) => x))].sort((a, b) => a - b);
    const values = points.map(([, y]) => this.scaled(y));
    const low = Math.min(...values), high = Math.max(...values), room = (high - low || Math.abs(high) || 1) * 0.06;
    [this.low, this.high] = [low - room, high + room];
    this.draw();
  }

  scaled(value) { return this.panel.log ? Math.log10(value) : value; }

  x(epoch) {
    const { left, right } = Chart.EDGE, first = this.epochs[0], last = this.epochs.at(-1);
    return left + (last > first ? (epoch - first) / (last - first) : 0.5) * (this.width - left - right);
  }

  y(value) {
    const { top, bottom } = Chart.EDGE;
    return top + (this.high - this.scaled(value)) / (this.high - this.low) * (Chart.HEIGHT - top - bottom);
  }

  colour(index) {
    const shade = this.panel.series[index].shade;
    return shade === undefined ? `var(--c${index % 4})` : `hsl(${250 - 215 * shade} 65% 55%)`;
  }

  draw() {
    this.width = this.figure.clientWidth;
    if (!this.width) return;
    this.drawing.setAttribute("viewBox", `0 0 ${this.width} ${Chart.HEIGHT}`);
    this.drawing.replaceChildren(...this.axes(), ...this.panel.series.flatMap((one, index) => this.line(one, index)));
    this.cursor = element("g");
    this.drawing.append(this.cursor);
    this.choose(this.epoch);
  }

  axes() {
    const { left, right, bottom } = Chart.EDGE, end = this.width - right, floor = Chart.HEIGHT - bottom;
    const heights = this.panel.log ? powers(this.low, this.high) : ticks(this.low, this.high, 6);
    const across = ticks(this.epochs[0], this.epochs.at(-1) || 1, Math.min(8, this.width / 70)).filter(Number.isInteger);
    return [
      ...heights.flatMap((value) => [
        element("line", { class: "grid", x1: left, x2: end, y1: this.y(value), y2: this.y(value) }),
        element("text", { x: left - 6, y: this.y(value) + 4, "text-anchor": "end" }, short(value)),
      ]),
      ...across.map((value) => element("text", { x: this.x(value), y: floor + 15, "text-anchor": "middle" }, String(value))),
      element("text", { x: end, y: Chart.HEIGHT - 4, "text-anchor": "end" }, this.panel.log ? "epoch; values logarithmic" : "epoch"),
    ];
  }

  line(one, index) {
    const colour = `stroke:${this.colour(index)}`, path = (points) => "M" + points.map(([x, y]) => `${this.x(x)} ${this.y(y)}`).join("L");
    const drawn = [element("path", { d: path(one.points), style: colour })];
    if (one.band) {
      const side = (which) => one.band.map((ends, at) => [one.points[at][0], ends[which]]);
      const around = path([...side(0), ...side(1).reverse()]);
      drawn.unshift(element("path", { class: "band", d: around + "Z", style: `fill:${this.colour(index)}` }));
    }
    if (one.points.length > 40) return drawn;
    return [...drawn, ...one.points.map(([x, y]) => this.dot(x, y, index, 2.5))];
  }

  dot(x, y, index, radius) {
    return element("circle", { cx: this.x(x), cy: this.y(y), r: radius, style: `fill:${this.colour(index)}` });
  }

  point(event) {
    const at = event.clientX - this.drawing.getBoundingClientRect().left;
    this.choose(this.epochs.reduce((best, one) => (Math.abs(this.x(one) - at) < Math.abs(this.x(best) - at) ? one : best)));
  }

  press(event) {
    const at = this.epoch === null ? this.epochs.length - 1 : this.epochs.indexOf(this.epoch), last = this.epochs.length - 1;
    const next = { ArrowLeft: at - 1, ArrowDown: at - 1, ArrowRight: at + 1, ArrowUp: at + 1, Home: 0, End: last }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    this.choose(this.epochs[Math.max(0, Math.min(last, next))]);
  }

  /** Show the values of an epoch; null shows the last value of each line. */
  choose(epoch) {
    this.epoch = this.epochs.includes(epoch) ? epoch : null;
    const values = this.panel.series.map((one) => (
      this.epoch === null ? one.points.at(-1) : one.points.find(([x]) => x === this.epoch)));
    this.legend.replaceChildren(
      element("li", { class: "at" }, this.epoch === null ? "last" : `epoch ${this.epoch}`),
      ...this.panel.series.map((one, index) => element("li", {},
        element("i", { style: `background:${this.colour(index)}` }), `${one.name} `,
        element("b", {}, values[index] ? short(values[index][1]) : "–"))));
    this.describe(values);
    if (!this.cursor) return;
    const { top, bottom } = Chart.EDGE;
    this.cursor.replaceChildren(...(this.epoch === null ? [] : [
      element("line", { class: "cursor", x1: this.x(epoch), x2: this.x(epoch), y1: top, y2: Chart.HEIGHT - bottom }),
      ...values.flatMap((value, index) => (value ? [this.dot(...value, index, 4.5)] : [])),
    ]));
  }

  describe(values) {
    const told = this.panel.series.map((one, index) => `${one.name} ${values[index] ? short(values[index][1]) : "not measured"}`);
    const at = this.epoch ?? this.epochs.at(-1);
    for (const [key, value] of Object.entries({
      label: `${this.panel.title} by epoch`, valuemin: this.epochs[0], valuemax: this.epochs.at(-1), valuenow: at,
      valuetext: `epoch ${at}: ${told.join(", ")}`,
    })) this.drawing.setAttribute(`aria-${key}`, value);
  }
}
