// The three parts of the Atlas that are drawn here; `part` says which: "hits", "map" or "own".

const ownLabels = (key) => { try { return JSON.parse(localStorage.getItem(key) ?? "{}"); } catch { return {}; } };

// ---- hits: a list of buttons; arrows walk through it, one tab stop -----------------------------------------------
function hits() {
  const buttons = () => [...element.querySelectorAll(".dl-hits button")];
  const rove = (chosen) => buttons().forEach((b) => b.setAttribute("tabindex", b === chosen ? "0" : "-1"));
  const settle = () => rove(buttons()[0]);
  element.addEventListener("click", (event) => {
    const chip = event.target.closest("[data-chip]");
    if (chip) return trigger("chip", { chip: chip.dataset.chip });
    const button = event.target.closest("[data-feature]");
    if (!button) return;
    rove(button);
    trigger("pick", { id: Number(button.dataset.feature) });
  });
  element.addEventListener("keydown", (event) => {
    const all = buttons(), at = all.indexOf(event.target.closest?.("[data-feature]"));
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (at < 0 || !step) return;
    event.preventDefault();
    const next = all[Math.min(all.length - 1, Math.max(0, at + step))];
    rove(next);
    next.focus();
  });
  watch("value", () => setTimeout(settle, 0));
  setTimeout(settle, 0);
}

// ---- map: an SVG of all features; drag moves, wheel, fingers and buttons zoom, the lasso catches -------------------
function map() {
  const NS = "http://www.w3.org/2000/svg";
  const data = JSON.parse(props.points);
  const n = data.confidence.length;
  const RADII = [0.14, 0.17, 0.22, 0.4];
  const make = (name, attributes, parent) => {
    const node = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    parent?.append(node);
    return node;
  };
  let svg, dots, names, box, tip, ring, lassoPath, lassoOn = false, view = null;
  const x = (i) => data.xy[2 * i], y = (i) => data.xy[2 * i + 1];
  const unit = () => view.w / Math.max(1, svg.clientWidth);

  const frame = () => {
    const ratio = Math.max(1, svg.clientWidth) / Math.max(1, svg.clientHeight);
    const w = Math.max(data.width, data.height * ratio);
    return { x: (data.width - w) / 2, y: (data.height - w / ratio) / 2, w };
  };
  const show = () => {
    if (!svg.clientWidth || !svg.clientHeight) return; // another tab is shown
    const ratio = svg.clientWidth / svg.clientHeight;
    svg.setAttribute("viewBox", `${view.x} ${view.y} ${view.w} ${view.w / ratio}`);
    const px = unit(), letter = svg.clientWidth < 500 ? 9.5 : 11.5, size = letter * px;
    const taken = []; // labels, the largest islands first, where there is room
    for (const text of names) {
      text.setAttribute("font-size", size);
      const half = text.textContent.length * size * 0.29, at = [Number(text.getAttribute("x")), Number(text.getAttribute("y"))];
      const room = taken.every(([ox, oy, oh]) => Math.abs(ox - at[0]) > half + oh || Math.abs(oy - at[1]) > size * 1.05);
      if (room) taken.push([...at, half]);
      text.style.display = room ? "" : "none";
    }
    for (const i of [0, 1, 2, 3]) svg.style.setProperty(`--dl-r${i}`, `${Math.max(RADII[i], (i === 3 ? 2.6 : 1) * px)}px`);
    ring?.setAttribute("r", Math.max(0.7, 8 * px));
    ring?.setAttribute("stroke-width", 2.5 * px);
  };
  const zoom = (factor, cx = svg.clientWidth / 2, cy = svg.clientHeight / 2) => {
    const w = Math.min(frame().w * 1.05, Math.max(6, view.w / factor)), px = unit();
    const after = w / svg.clientWidth;
    view = { x: view.x + cx * (px - after), y: view.y + cy * (px - after), w };
    show();
  };
  const nearest = (event, reach) => {
    const rect = svg.getBoundingClientRect(), px = unit();
    const wx = view.x + (event.clientX - rect.left) * px, wy = view.y + (event.clientY - rect.top) * px;
    let best = -1, least = (reach * px) ** 2;
    for (let i = 0; i < n; i++) {
      const d = (x(i) - wx) ** 2 + (y(i) - wy) ** 2;
      if (d < least) { least = d; best = i; }
    }
    return best;
  };

  const seen = new Map();
  let hovered = -1, waiting = 0;
  const hover = (event) => {
    const i = event.pointerType === "touch" ? -1 : nearest(event, 9);
    if (i === hovered) return;
    hovered = i;
    clearTimeout(waiting);
    if (i < 0) { tip.hidden = true; return; }
    const rect = box.getBoundingClientRect(), px = unit();
    tip.hidden = false;
    const left = (x(i) - view.x) / px, top = (y(i) - view.y) / px;
    tip.style.left = `${Math.min(Math.max(4, left - 90), rect.width - 190)}px`;
    tip.style.top = top > rect.height / 2 ? `${top - 120}px` : `${top + 16}px`;
    const mine = ownLabels(props.storage)[i];
    const own = mine ? ` · yours: ${mine.text}` : "";
    tip.textContent = `#${i} ${data.labels[i] || "no label"}${own}`;
    const fill = (html) => {
      if (hovered !== i || !html) return;
      tip.innerHTML = html; // made by the app's own template, everything in it escaped
      if (own) tip.append(own);
    };
    if (seen.has(i)) fill(seen.get(i));
    else waiting = setTimeout(async () => { const html = await server.peek(i); seen.set(i, html); fill(html); }, 120);
  };

  const inside = (polygon, px, py) => {
    let odd = false;
    for (let i = 0, j = polygon.length - 1; i < polygon.length; j = i++) {
      const [ax, ay] = polygon[i], [bx, by] = polygon[j];
      if ((ay > py) !== (by > py) && px < ((bx - ax) * (py - ay)) / (by - ay) + ax) odd = !odd;
    }
    return odd;
  };
  const world = (event) => {
    const rect = svg.getBoundingClientRect(), px = unit();
    return [view.x + (event.clientX - rect.left) * px, view.y + (event.clientY - rect.top) * px];
  };

  const pointers = new Map();
  let polygon = null, moved = 0;
  const down = (event) => {
    pointers.set(event.pointerId, [event.clientX, event.clientY]);
    svg.setPointerCapture(event.pointerId);
    moved = 0;
    if (lassoOn || event.shiftKey) polygon = [world(event)];
  };
  const move = (event) => {
    const before = pointers.get(event.pointerId);
    if (!before) return hover(event);
    const now = [event.clientX, event.clientY];
    moved += Math.abs(now[0] - before[0]) + Math.abs(now[1] - before[1]);
    if (polygon) {
      polygon.push(world(event));
      lassoPath.setAttribute("d", `M${polygon.map((p) => p.map((v) => v.toFixed(2)).join(" ")).join("L")}Z`);
      lassoPath.setAttribute("stroke-width", 2 * unit());
    } else if (pointers.size === 2) {
      const other = [...pointers].find(([id]) => id !== event.pointerId)[1];
      const far = (a, b) => Math.hypot(a[0] - b[0], a[1] - b[1]);
      const rect = svg.getBoundingClientRect();
      const mid = [(now[0] + other[0]) / 2 - rect.left, (now[1] + other[1]) / 2 - rect.top];
      zoom(far(now, other) / Math.max(1, far(before, other)), ...mid);
    } else {
      const px = unit();
      view = { ...view, x: view.x - (now[0] - before[0]) * px, y: view.y - (now[1] - before[1]) * px };
      show();
    }
    pointers.set(event.pointerId, now);
  };
  const up = (event) => {
    if (!pointers.delete(event.pointerId)) return;
    if (polygon) {
      const caught = polygon.length > 3 ? [...Array(n).keys()].filter((i) => inside(polygon, x(i), y(i))) : [];
      polygon = null;
      dots.forEach((dot, i) => dot.classList.toggle("dl-caught", caught.includes(i)));
      if (!caught.length) lassoPath.setAttribute("d", "");
      trigger("lasso", { ids: caught });
    } else if (moved < 6) {
      const i = nearest(event, event.pointerType === "touch" ? 18 : 12);
      if (i >= 0) trigger("pick", { id: i });
    }
  };

  const build = () => {
    box = element.querySelector(".dl-map");
    box.replaceChildren();
    svg = make("svg", { role: "img", tabindex: "-1" }, box);
    make("rect", { x: -999, y: -999, width: 2999, height: 2999, fill: "transparent" }, svg);
    for (const [, , rx, ry, r] of data.regions) make("circle", { class: "dl-island", cx: rx, cy: ry, r: r + 0.35 }, svg);
    dots = [];
    for (let i = 0; i < n; i++) dots.push(make("circle", { class: `dl-dot dl-p${data.confidence[i]}`, cx: x(i), cy: y(i) }, svg));
    names = [];
    for (const [label, attribute, rx, ry, r] of [...data.regions].sort((a, b) => b[4] - a[4])) {
      const text = make("text", { class: "dl-region", x: rx, y: ry - r - 0.3, "text-anchor": "middle" }, svg);
      names.push(text);
      text.textContent = label;
      make("title", {}, text).textContent = `${attribute}: ${label}`;
    }
    lassoPath = make("path", { class: "dl-lassopath", d: "" }, svg);
    ring = make("circle", { class: "dl-ring", r: 1 }, svg);
    tip = document.createElement("div");
    tip.className = "dl-tip";
    tip.hidden = true;
    const tools = document.createElement("div");
    tools.className = "dl-tools";
    tools.setAttribute("role", "toolbar");
    tools.setAttribute("aria-label", "Map");
    tools.dataset.rove = "";
    const tool = (text, label, act) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = text;
      button.setAttribute("aria-label", label);
      button.title = label;
      button.tabIndex = tools.childElementCount ? -1 : 0;
      button.addEventListener("click", () => act(button));
      tools.append(button);
    };
    tool("+", "Zoom in", () => zoom(1.6));
    tool("−", "Zoom out", () => zoom(1 / 1.6));
    tool("⤢", "Show all", () => { view = frame(); show(); });
    tool("Lasso", "Lasso: ring features to steer them together", (button) => {
      lassoOn = !lassoOn;
      button.setAttribute("aria-pressed", lassoOn);
      box.classList.toggle("dl-lassoing", lassoOn);
    });
    box.append(tip, tools);
    svg.addEventListener("pointerdown", down);
    svg.addEventListener("pointermove", move);
    svg.addEventListener("pointerup", up);
    svg.addEventListener("pointercancel", (event) => { pointers.delete(event.pointerId); polygon = null; });
    svg.addEventListener("pointerleave", () => { hovered = -1; tip.hidden = true; });
    svg.addEventListener("wheel", (event) => {
      event.preventDefault();
      const rect = svg.getBoundingClientRect();
      zoom(Math.exp(-event.deltaY / 400), event.clientX - rect.left, event.clientY - rect.top);
    }, { passive: false });
    view = frame();
    show();
    let size = svg.clientWidth;
    new ResizeObserver(() => {
      if (!svg.isConnected || !svg.clientWidth || svg.clientWidth === size) return;
      size = svg.clientWidth;
      view = frame();
      show();
    }).observe(svg);
  };

  const update = () => {
    if (!element.querySelector(".dl-map > svg")) build();
    const value = props.value ?? {};
    svg.setAttribute("aria-label", value.alt ?? "");
    const lit = new Set(value.hits ?? []);
    box.classList.toggle("dl-searching", lit.size > 0);
    box.classList.toggle("dl-scored", Boolean(value.scores));
    dots.forEach((dot, i) => {
      dot.classList.toggle("dl-hit", lit.has(i));
      if (value.scores) dot.style.setProperty("--dl-score", `${value.scores[i]}%`);
    });
    const chosen = value.chosen;
    ring.style.display = Number.isInteger(chosen) ? "" : "none";
    if (!Number.isInteger(chosen)) return;
    ring.setAttribute("cx", x(chosen));
    ring.setAttribute("cy", y(chosen));
    if (update.last !== undefined && update.last !== chosen) window.dl?.remember?.("atlas", { feature: chosen });
    update.last = chosen;
  };
  watch("value", update);
  update();
  const asked = new URLSearchParams(location.search);
  if (asked.get("tab") === "atlas" && asked.has("feature")) {
    setTimeout(() => trigger("pick", { id: Number(asked.get("feature")) }), 0);
  }
}

// ---- a person's own label: kept in this browser alone, apart from what was computed ---------------------------------
function own() {
  const MAX_TEXT = 80, MAX_BY = 8, MAX_LABELS = 5000, MAX_FILE = 1000000;
  const key = props.storage;
  const clean = (entry) =>
    entry && typeof entry.text === "string" && entry.text.trim()
      ? { text: entry.text.trim().slice(0, MAX_TEXT), by: String(entry.by ?? "").trim().slice(0, MAX_BY) }
      : null;
  const save = (all) => {
    try { localStorage.setItem(key, JSON.stringify(all)); return true; } catch { return false; }
  };
  let box, text, by, note, current, list;
  const say = (words) => { note.textContent = words; };
  const tell = () => {
    const all = ownLabels(key), mine = all[props.value];
    current.textContent = mine ? `Yours: “${mine.text}”${mine.by ? ` (${mine.by})` : ""}` : "";
    text.value = mine?.text ?? "";
    if (mine?.by) by.value = mine.by;
    const count = Object.keys(all).length;
    list.textContent = count ? `${count} of your labels are kept in this browser.` : "Kept in this browser alone; nobody else sees it.";
  };
  const field = (label, size, width) => {
    const wrap = document.createElement("label");
    wrap.textContent = label;
    const input = document.createElement("input");
    input.maxLength = size;
    input.style.width = width;
    wrap.append(input);
    return [wrap, input];
  };
  const button = (words, act) => {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = words;
    made.addEventListener("click", act);
    return made;
  };
  const build = () => {
    box = element.querySelector(".dl-own-label");
    box.replaceChildren();
    const title = document.createElement("h3");
    title.textContent = "Your own label";
    current = document.createElement("p");
    current.className = "dl-mine";
    const [textWrap, textInput] = field("What you see", MAX_TEXT, "100%");
    const [byWrap, byInput] = field("Initials", MAX_BY, "5em");
    [text, by] = [textInput, byInput];
    const row = document.createElement("form");
    row.append(textWrap, byWrap, button("Save", () => row.requestSubmit()));
    row.addEventListener("submit", (event) => {
      event.preventDefault();
      const all = ownLabels(key), entry = clean({ text: text.value, by: by.value });
      if (entry) all[props.value] = entry; else delete all[props.value];
      const kept = Object.keys(all).length <= MAX_LABELS && save(all);
      tell();
      say(kept ? (entry ? "Saved." : "Removed.") : "This browser keeps nothing more.");
    });
    const file = document.createElement("input");
    file.type = "file";
    file.accept = "application/json,.json";
    file.hidden = true;
    file.setAttribute("aria-label", "File of labels");
    file.addEventListener("change", async () => {
      const chosen = file.files[0];
      file.value = "";
      if (!chosen) return;
      if (chosen.size > MAX_FILE) return say("A file of labels has at most 1 MB.");
      try {
        const read = JSON.parse(await chosen.text());
        if (read.format !== "diffusion-lens labels" || typeof read.labels !== "object") throw new Error();
        if (read.features !== key) return say("These labels are of another lens's features.");
        const all = ownLabels(key);
        let taken = 0;
        for (const [i, entry] of Object.entries(read.labels)) {
          const found = clean(entry);
          if (/^\d{1,7}$/.test(i) && found && Object.keys(all).length < MAX_LABELS) { all[i] = found; taken += 1; }
        }
        save(all);
        tell();
        say(`${taken} labels read.`);
      } catch { say("This is no file of labels; take one that “Export” wrote."); }
    });
    const files = document.createElement("p");
    files.className = "dl-files";
    files.append(
      button("Export", () => {
        const kept = JSON.stringify({ format: "diffusion-lens labels", features: key, labels: ownLabels(key) }, null, 1);
        const link = document.createElement("a");
        link.href = URL.createObjectURL(new Blob([kept], { type: "application/json" }));
        link.download = "labels.json";
        link.click();
        setTimeout(() => URL.revokeObjectURL(link.href), 5000);
      }),
      button("Import", () => file.click()),
      file,
    );
    list = document.createElement("p");
    list.className = "dl-quiet";
    note = document.createElement("p");
    note.setAttribute("role", "status");
    box.append(title, current, row, files, list, note);
  };
  const update = () => { if (!element.querySelector("form")) build(); say(""); tell(); };
  watch("value", update);
  update();
}

({ hits, map, own })[part]();
