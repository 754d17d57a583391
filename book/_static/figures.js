/* Figures that answer: <usf-figure> draws what usf.plots.interactive computed and put into it as JSON.
 *
 * One slider; panels of points (one point has one place in each panel) and of lines (over the slider's positions).
 * A point is chosen with the pointer, or with the arrow keys in any panel, and is then marked in all of them.
 * No dependencies, nothing is loaded; without this file the element shows the sentence that it holds.
 */
(() => {
  "use strict";
  const SIDE = 240, LEFT = 36, BOTTOM = 34, TOP = 6, RIGHT = 8;
  const HELP = "Choose a point with the pointer or with the arrow keys; Home and End: the likeliest and the rarest; " +
    "Page Up and Page Down: along the density; Escape: none.";
  let count = 0;

  const html = (name, attributes, parent, text) => {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    if (parent) parent.append(node);
    return node;
  };
  const svg = (name, attributes, parent, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes || {})) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    if (parent) parent.append(node);
    return node;
  };

  class UsfFigure extends HTMLElement {
    connectedCallback() {
      if (document.readyState === "loading") {
        document.addEventListener("DOMContentLoaded", () => this.build(), { once: true });
      } else {
        this.build();
      }
    }

    build() {
      const data = this.querySelector("script");
      if (this.spec || !data) return;
      this.spec = JSON.parse(data.textContent);
      this.frame = 0;
      this.chosen = null;
      this.place = {}; // where a point stands in the order of density
      this.spec.order.forEach((point, index) => { this.place[point] = index; });
      this.replaceChildren();
      const id = `usf-figure-${++count}`;
      const caption = this.closest("figure") && this.closest("figure").querySelector("figcaption");
      this.setAttribute("role", "group");
      if (caption) {
        caption.id = caption.id || `${id}-caption`;
        this.setAttribute("aria-labelledby", caption.id);
      } else {
        this.setAttribute("aria-label", this.spec.slider.label);
      }

      const { label, values } = this.spec.slider;
      const control = html("div", { class: "control" }, this);
      html("label", { for: `${id}-slider` }, control, label);
      this.slider = html("input", { type: "range", id: `${id}-slider`, min: 0, max: values.length - 1, step: 1, value: 0 }, control);
      this.value = html("output", { for: `${id}-slider` }, control);
      this.slider.addEventListener("input", () => { this.frame = Number(this.slider.value); this.update(true); });

      this.said = this.list(this.spec.frame, this);
      const grid = html("div", { class: "panels" }, this);
      html("p", { id: `${id}-help`, class: "help" }, this, HELP);
      this.panels = this.spec.panels.map(panel => panel.lines ? this.lines(panel, grid) : this.points(panel, grid, `${id}-help`));
      this.told = this.list(this.spec.point, this);
      this.told.setAttribute("aria-live", "polite");
      // Text and marks keep their size, however wide the panel is.
      const sizes = new ResizeObserver(() => {
        const width = this.panels[0].root.getBoundingClientRect().width;
        if (width) this.style.setProperty("--unit", SIDE / width);
      });
      sizes.observe(grid);
      this.update(true);
    }

    list(rows, parent) {
      const list = html("dl", {}, parent);
      for (const [name] of rows) {
        const item = html("div", {}, list);
        html("dt", {}, item, name);
        html("dd", {}, item, "–");
      }
      return list;
    }

    /* A panel's frame: title, ticks, and a window that clips what is drawn. */
    axes(panel, grid, xticks, xlim) {
      const box = html("div", { class: "panel" }, grid);
      html("div", { class: "title" }, box, panel.title);
      const root = svg("svg", { viewBox: `0 0 ${SIDE} ${SIDE}` }, box);
      const [x0, x1] = xlim, [y0, y1] = panel.ylim;
      const x = v => LEFT + (v - x0) / (x1 - x0) * (SIDE - LEFT - RIGHT);
      const y = v => SIDE - BOTTOM - (v - y0) / (y1 - y0) * (SIDE - TOP - BOTTOM);
      const axis = svg("g", { class: "axis", "aria-hidden": "true" }, root);
      svg("path", { d: `M${LEFT} ${TOP}V${SIDE - BOTTOM}H${SIDE - RIGHT}` }, axis);
      for (const [v, text] of xticks) svg("text", { x: x(v), y: SIDE - BOTTOM + 13, class: "middle" }, axis, text);
      for (const [v, text] of panel.yticks) svg("text", { x: LEFT - 5, y: y(v) + 3, class: "end" }, axis, text);
      if (panel.x) svg("text", { x: (LEFT + SIDE - RIGHT) / 2, y: SIDE - 5, class: "middle" }, axis, panel.x);
      if (panel.y) svg("text", { transform: `translate(9 ${(SIDE - BOTTOM) / 2}) rotate(-90)`, class: "middle" }, axis, panel.y);
      const clip = `clip-${++count}`;
      svg("rect", { x: LEFT, y: TOP, width: SIDE - LEFT - RIGHT, height: SIDE - TOP - BOTTOM },
        svg("clipPath", { id: clip }, svg("defs", {}, root)));
      const area = svg("g", { "clip-path": `url(#${clip})` }, root);
      return { root, box, x, y, area };
    }

    points(panel, grid, help) {
      const made = this.axes(panel, grid, panel.xticks, panel.xlim);
      const { root, x, y, area } = made;
      root.setAttribute("role", "application");
      root.setAttribute("aria-roledescription", "scatter plot");
      root.setAttribute("aria-label", `${panel.title}, ${this.spec.colors.length} points`);
      root.setAttribute("aria-describedby", help);
      root.setAttribute("tabindex", "0");
      const dots = this.spec.colors.map(color => svg("circle", { class: "dot", fill: color }, area));
      const orbit = panel.orbit && svg("circle", { class: "orbit", cx: x(0), cy: y(0) }, area);
      const ring = svg("circle", { class: "ring" }, area);
      let now = [];
      const move = () => {
        const frames = this.spec.positions[panel.of];
        const [xs, ys] = frames[Math.min(this.frame, frames.length - 1)];
        const scale = panel.scale ? panel.scale[this.frame] : 1;
        now = xs.map((v, i) => [x(v * scale), y(ys[i] * scale)]);
        const focus = this.spec.focus && new Set(this.spec.focus[this.frame]);
        dots.forEach((dot, i) => {
          dot.style.transform = `translate(${now[i][0].toFixed(1)}px, ${now[i][1].toFixed(1)}px)`;
          if (focus) dot.classList.toggle("pale", !focus.has(i));
        });
        if (focus) for (const i of focus) area.insertBefore(dots[i], orbit || ring);
      };
      const draw = moved => {
        if (moved) move();
        const shown = this.chosen !== null;
        ring.classList.toggle("off", !shown);
        if (orbit) orbit.classList.toggle("off", !shown);
        if (!shown) return;
        const [px, py] = now[this.chosen];
        ring.style.transform = dots[this.chosen].style.transform;
        if (orbit) orbit.setAttribute("r", Math.hypot(px - x(0), py - y(0)).toFixed(2));
      };
      const nearest = event => {
        const box = root.getBoundingClientRect(), unit = SIDE / box.width;
        const px = (event.clientX - box.left) * unit, py = (event.clientY - box.top) * unit;
        let best = null, reach = 20 * unit;
        now.forEach(([a, b], i) => {
          const distance = Math.hypot(a - px, b - py);
          if (distance < reach) { reach = distance; best = i; }
        });
        return best;
      };
      const pointed = event => { const found = nearest(event); if (found !== null) this.choose(found); };
      root.addEventListener("pointermove", event => { if (event.pointerType === "mouse") pointed(event); });
      root.addEventListener("click", pointed);
      root.addEventListener("keydown", event => {
        const found = this.key(event.key, now);
        if (found === undefined) return;
        event.preventDefault();
        this.choose(found);
      });
      return { ...made, draw };
    }

    /* The point that a key leads to; undefined for keys that mean nothing here. */
    key(name, now) {
      const { order } = this.spec, at = this.chosen === null ? -1 : this.place[this.chosen];
      if (name === "Escape") return null;
      if (name === "Home") return order[0];
      if (name === "End") return order[order.length - 1];
      if (name === "PageDown") return order[Math.min(at + 1, order.length - 1)];
      if (name === "PageUp") return order[Math.max(at - 1, 0)];
      const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[name];
      if (!way) return undefined;
      if (at < 0) return order[0];
      const [px, py] = now[this.chosen];
      let best = this.chosen, least = Infinity;
      now.forEach(([a, b], i) => {
        const along = (a - px) * way[0] + (b - py) * way[1];
        const aside = Math.abs((a - px) * way[1]) + Math.abs((b - py) * way[0]);
        if (i === this.chosen || along <= 1e-6 || aside > 2 * along) return;
        const cost = along + 2 * aside;
        if (cost < least) { least = cost; best = i; }
      });
      return best;
    }

    lines(panel, grid) {
      const { values } = this.spec.slider, last = values.length - 1;
      const ticks = [...new Set([0, Math.round(last / 2), last])].map(i => [i, values[i]]);
      const made = this.axes({ ...panel, x: this.spec.slider.label }, grid, ticks, [-0.3, last + 0.3]);
      const { root, box, x, y, area } = made;
      root.setAttribute("role", "img");
      const rule = svg("path", { class: "rule" }, area);
      const marks = panel.lines.map((line, n) => {
        svg("polyline", { class: `line dash-${n}`, stroke: line.color, points: line.values.map((v, i) => `${x(i)},${y(v)}`).join(" ") }, area);
        return svg("circle", { class: "mark", fill: line.color }, area);
      });
      if (panel.lines.length > 1) {
        const legend = html("div", { class: "legend", "aria-hidden": "true" }, box);
        panel.lines.forEach((line, n) => {
          const item = html("span", {}, legend);
          const key = svg("svg", { viewBox: "0 0 24 6" }, item);
          svg("path", { d: "M0 3H24", class: `line dash-${n}`, stroke: line.color }, key);
          item.append(line.label);
        });
      }
      const draw = moved => {
        if (!moved) return;
        rule.setAttribute("d", `M${x(this.frame)} ${TOP}V${SIDE - BOTTOM}`);
        marks.forEach((mark, n) => {
          mark.style.transform = `translate(${x(this.frame)}px, ${y(panel.lines[n].values[this.frame])}px)`;
        });
        const told = panel.lines.map(line => `${line.label}: ${line.values[this.frame]}`).join("; ");
        root.setAttribute("aria-label", `${panel.title}. At ${values[this.frame]}: ${told}`);
      };
      return { ...made, draw };
    }

    choose(point) {
      if (point === this.chosen) return;
      this.chosen = point;
      this.update(false);
    }

    update(moved) {
      const { slider, frame, point } = this.spec;
      this.value.textContent = slider.values[this.frame];
      this.slider.setAttribute("aria-valuetext", slider.values[this.frame]);
      this.said.querySelectorAll("dd").forEach((cell, i) => { cell.textContent = frame[i][1][this.frame]; });
      this.told.querySelectorAll("dd").forEach((cell, i) => {
        const values = point[i][1], now = values[Math.min(this.frame, values.length - 1)];
        cell.textContent = this.chosen === null ? "–" : String(now[this.chosen]).replace("-", "−");
      });
      for (const panel of this.panels) panel.draw(moved);
    }
  }

  customElements.define("usf-figure", UsfFigure);
})();
