// The workbench: a sentence, images before and after, a slider that is the plot, feature rows. It shows scenes from
// the server and asks it for views; while a slider is dragged along a flip-book it asks nobody.
(() => {
  const dl = (window.dl ??= {});
  const SVG = "http://www.w3.org/2000/svg";
  const minus = (text) => String(text).replace("-", "−");
  const num = (x, digits = 2) => minus(Number(x.toFixed(digits)));
  const signed = (x, digits = 1) => (x > 0 ? "+" : "") + num(x, digits);
  const percent = (x) => `${Math.round(100 * x)} %`;
  const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
  const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);

  const h = (tag, attributes = {}, ...children) => {
    const made = tag === "svg" || attributes.svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "svg" || value === undefined || value === null || value === false) continue;
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (name in made && typeof value !== "string" && !attributes.svg) made[name] = value;
      else made.setAttribute(name, value === true ? "" : value);
    }
    for (const child of children.flat()) {
      if (child === null || child === undefined || child === false) continue;
      made.append(child);
    }
    return made;
  };
  const s = (tag, attributes, ...children) => h(tag, { ...attributes, svg: true }, ...children);

  dl.pane = ({ element, props, trigger, watch, server, events }) => {
    const [DRAW, MEASURE, HALT, ALONE] = events;
    const root = element.querySelector(".dx");
    const part = Object.fromEntries([...root.querySelectorAll("[data-part]")].map((e) => [e.dataset.part, e]));
    const compact = root.classList.contains("dx-compact");
    const narrow = matchMedia("(max-width: 640px)");

    const linked = !compact && /[?&]v=/.test(location.search);
    let view = structuredClone(props.value?.view ?? {});
    let scene = {};
    let curve = null; // of curveOf: exactly that view's mix, whatever its strength
    let curveOf = "";
    let book = null;
    let bookOf = "";
    let sprite = null;
    let serial = 0; // of the newest question
    let shown = 0; // of the newest answer
    let drafting = false;
    let again = false;
    let dragging = false;
    let busy = false;
    let picturesSet = ""; // the prompt, class and seeds of the images on screen
    let picturesOf = null; // the view that the after row shows
    let measuring = null;
    let sentence = ""; // what "Go to even" said; it stays
    let said = "";
    let rowsWanted = 6;
    let rowsOf = "";
    let opener = null;
    let keyed = null; // the view before keys began to move the slider
    let typing = 0;
    const tried = new Map(); // what a feature alone changed, in which setting
    const muted = new Map(); // feature → its strength before it was muted
    const past = [];
    const future = [];

    // ---- views --------------------------------------------------------------------------------------------------
    const mixOf = (v) => JSON.stringify({ ...v, beta: 0, n_seeds: 0, first_seed: 0, own: sorted(v.own), hold: [...(v.hold ?? [])].sort() });
    const sorted = (own) => Object.entries(own ?? {}).sort(([a], [b]) => a - b);
    const setOf = (v) => JSON.stringify([v.prompt, v.attribute, v.target, v.n_seeds, v.first_seed]);
    const scale = () => scene.scale ?? { low: -1, high: 3, step: 0.1, identity: 1 };
    const steers = () => view.beta !== scale().identity || Object.values(view.own ?? {}).some((b) => b !== scale().identity);
    const snap = (beta) => {
      const { low, high, step, identity } = scale();
      return Number(clamp(identity + Math.round((beta - identity) / step) * step, low, high).toFixed(4));
    };
    const query = (v) => {
      const q = new URLSearchParams({ v: "1" });
      if (v.prompt !== null) q.set("p", v.prompt === "(no words)" ? "" : v.prompt);
      q.set("a", v.attribute); q.set("t", v.target); q.set("b", String(v.beta));
      q.set("n", v.n_seeds); q.set("s", v.first_seed); q.set("k", v.n_features); q.set("m", v.sampler);
      q.set("w", v.window ? v.window.join("-") : "all");
      if (v.hold?.length) q.set("h", v.hold.join(","));
      const own = Object.entries(v.own ?? {});
      if (own.length) q.set("f", own.map(([i, b]) => `${i}:${b}`).join(","));
      if (v.solo?.length) q.set("o", v.solo.join(","));
      if (v.where) q.set("x", v.where.map((row) => row.replaceAll("#", "1").replaceAll(".", "0")).join("-"));
      return `?${q}`;
    };
    const remember = () => { if (!compact && (linked || past.length)) dl.remember("explore", {}, query(view)); };

    // ---- questions ----------------------------------------------------------------------------------------------
    const ask = (more = {}) => {
      serial += 1;
      props.value = { view: structuredClone(view), serial, known: scene.pictures?.before?.key ?? "", ...more };
      trigger(DRAW);
    };
    const wait = (on) => {
      busy = on;
      part.before.classList.toggle("dx-busy", on && picturesSet !== setOf(view));
      part.after.classList.toggle("dx-busy", on);
      part.after.setAttribute("aria-busy", String(on));
    };
    const keep = (before) => {
      if (before && !same(before, past.at(-1)) && !same(before, view)) { past.push(before); future.length = 0; }
      if (past.length > 100) past.shift();
    };
    // The view has been set: draw it in full, unless stored frames show it already.
    const commit = (before, more = {}) => {
      clearTimeout(typing);
      keyed = null;
      keep(before);
      sentence = more.sentence ?? "";
      delete more.sentence;
      if (book && onBook() && !Object.keys(more).length) {
        wait(false);
        flip();
        remember();
        props.value = { view: structuredClone(view), serial, known: "" };
        paint();
        return;
      }
      wait(true);
      ask(more);
      paint();
    };
    const change = (values, more = {}) => {
      const before = structuredClone(view);
      Object.assign(view, values);
      commit(before, more);
    };
    const draft = () => {
      if (drafting) { again = true; return; }
      drafting = true;
      wait(true);
      ask({ draft: true });
    };
    const moved = () => { // while a slider is dragged
      if (onBook()) flip();
      else draft();
      paint();
    };

    // ---- answers ------------------------------------------------------------------------------------------------
    const take = (news) => {
      if (!news || (news.serial ?? serial) < shown || (linked && news.serial === 0 && scene.choices)) return;
      if (news.serial !== undefined) shown = Math.max(shown, news.serial);
      const late = news.serial !== undefined && news.serial < serial;
      if (drafting && news.serial !== undefined && (news.pictures || news.said || news.alert)) {
        drafting = false;
        if (again && dragging) { again = false; queueMicrotask(draft); }
      }
      if (news.adopt && news.view && !late) view = structuredClone(news.view);
      const { pictures, ...rest } = news;
      scene = { ...scene, ...rest };
      if ("curve" in news) { curve = news.curve; curveOf = curve?.of === "this" ? mixOf(news.curve_of ?? news.view ?? view) : ""; }
      if ("book" in news) { book = news.book; bookOf = book ? setOf(news.view) + mixOf(news.view) : ""; if (book) load(book.src); }
      if ("measuring" in news) { measuring = news.measuring; if (!measuring && goal !== null && curve?.of === "this") seek(); }
      if ("said" in news) said = news.serial !== undefined && (late || onBook()) ? "" : news.said;
      if (news.alone) {
        if (news.alone.says) tried.set(setting(news.alone.of) + news.alone.id, news.alone.says);
        for (const [key, says] of tried) if (says === "…" && !news.alone.says) tried.delete(key);
        asking.shift();
        nextAlone();
      }
      if (pictures && !(late && !pictures.draft)) {
        const before = pictures.before?.images ? pictures.before : { ...scene.pictures?.before, ...(pictures.before ?? {}) };
        scene.pictures = { ...pictures, before };
        picturesOf = structuredClone(news.view && !pictures.draft ? news.view : view);
        picturesSet = setOf(picturesOf);
        drawBefore();
        if (!onBook() || pictures.draft) drawAfter();
      }
      const coming = book && !sprite?.ready && bookOf === setOf(view) + mixOf(view); // its frames are being fetched
      if (news.pending === false && !late) { if (!coming) wait(false); if (!news.alert) remember(); }
      if (pictures?.draft && !late) wait(dragging ? false : busy);
      if (news.alert !== undefined) part.alert.textContent = news.alert;
      if (news.alert) { wait(false); part.after.classList.add("dx-stale"); offerWords(news.alert); }
      if (onBook() && !late) { wait(false); flip(); if (!dragging) remember(); }
      if (news.view && rowsOf !== JSON.stringify([news.view.attribute, news.view.target, news.view.n_features])) {
        rowsOf = JSON.stringify([news.view.attribute, news.view.target, news.view.n_features]);
        extra = new Map(); // rows say what they do towards this class
        rowsWanted = 6;
      }
      if (news.view || news.rows) renderWords();
      paint();
    };

    // ---- flip-book ----------------------------------------------------------------------------------------------
    const onBook = () => Boolean(book && sprite?.ready && bookOf === setOf(view) + mixOf(view));
    const load = (src) => {
      if (sprite?.src === src) return;
      const image = new Image();
      sprite = { src, image, ready: false };
      const mine = sprite;
      image.onload = () => { mine.ready = true; if (sprite === mine && onBook()) { wait(false); flip(); paint(); } };
      image.onerror = () => { if (sprite !== mine) return; book = sprite = null; wait(true); ask({ no_book: true }); };
      image.src = src;
    };
    const nearest = (beta) => {
      let best = 0;
      book.betas.forEach((b, i) => { if (Math.abs(b - beta) < Math.abs(book.betas[best] - beta)) best = i; });
      return best;
    };
    let flipped = -1;
    const flip = () => {
      const place = nearest(view.beta);
      const start = nearest(book.identity);
      const n = view.n_seeds;
      const labels = (k) => Object.fromEntries(Object.entries(book.labels).map(([name, table]) => [name, table[k].slice(0, n)]));
      const known = picturesSet === setOf(view) && (scene.pictures?.before?.images || scene.pictures?.before?.place === start);
      const before = { ...(known ? scene.pictures.before : { place: start }), labels: labels(start) };
      const after = { labels: labels(place), sure: book.sure[place].slice(0, n), place };
      scene.pictures = { ...scene.pictures, beta: book.betas[place], before, after, draft: "", book: true,
        ratio: book.activation_ratio[place], seeds: book.seeds.slice(0, n) };
      picturesOf = structuredClone(view);
      picturesSet = setOf(view);
      if (!known) drawBefore();
      drawAfter();
      if (flipped !== place) { flipped = place; root.dataset.frame = String(place); }
    };
    const paintCell = (canvas, place, column) => {
      const [height, width] = book.cell;
      if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
      canvas.getContext("2d").drawImage(sprite.image, column * width, book.rows[place] * height, width, height, 0, 0, width, height);
    };

    // ---- images -------------------------------------------------------------------------------------------------
    const own = () => view.attribute;
    const label = (row, i) => row?.labels?.[own()]?.[i];
    const nameOf = (k) => (k === undefined ? "" : k < 0 ? "uncertain" : scene.choices.one[k]);
    const cellsOf = (grid, n) => {
      while (grid.children.length > n) grid.lastChild.remove();
      while (grid.children.length < n) {
        const i = grid.children.length;
        const button = h("button", { type: "button", class: "dx-image", tabindex: i ? "-1" : "0", onclick: () => enlarge(i) },
          h("img", { alt: "", draggable: false }), h("canvas", { hidden: true }));
        grid.append(h("figure", { class: "dx-figure" }, button, h("figcaption", { "aria-hidden": "true" })));
      }
      grid.dataset.rove = "";
      return [...grid.children];
    };
    const fill = (figure, row, i, alt, caption, kind) => {
      const [image, canvas] = figure.querySelectorAll("img, canvas");
      const src = row?.images?.[i];
      const drawn = row?.place !== undefined && sprite?.ready && book;
      image.hidden = Boolean(drawn) || !src; // no image rather than one of another setting
      canvas.hidden = !drawn;
      if (drawn) paintCell(canvas, row.place, i);
      else if (src && image.src !== src) image.src = src;
      const button = figure.firstChild;
      if (button.getAttribute("aria-label") !== alt) button.setAttribute("aria-label", alt);
      const told = figure.lastChild;
      if (told.textContent !== caption) told.textContent = caption;
      figure.className = `dx-figure ${kind}`;
    };
    const drawBefore = () => {
      const p = scene.pictures;
      const seeds = p?.seeds ?? [];
      cellsOf(part.before, seeds.length).forEach((figure, i) => {
        const name = nameOf(label(p.before, i));
        fill(figure, p.before, i, `Seed ${seeds[i]}, as the model draws it: ${name ? `read as ${name}` : "not read"}`, name, "");
      });
    };
    const drawAfter = () => {
      const p = scene.pictures;
      const seeds = p?.seeds ?? [];
      part.after.classList.remove("dx-stale");
      cellsOf(part.after, seeds.length).forEach((figure, i) => {
        const [was, is] = [label(p.before, i), label(p.after, i)];
        const changed = is !== undefined && was !== undefined && is !== was;
        const name = nameOf(is);
        const caption = p.draft ? "draft" : changed && is >= 0 ? scene.choices.now[is] : name;
        const sure = p.after?.sure?.[i];
        const alt = p.draft
          ? `Seed ${seeds[i]}, steered: ${p.draft}, not measured`
          : `Seed ${seeds[i]}, steered: read as ${name}${sure ? `, ${sure} % sure` : ""}${changed ? `, was ${nameOf(was)}` : ""}`;
        fill(figure, p.after, i, alt, caption, `${changed ? "dx-changed" : ""} ${p.draft ? "dx-draft" : ""}`);
      });
      root.style.setProperty("--dx-columns", String(Math.min(8, seeds.length || 8)));
    };
    const enlarge = (i) => {
      const p = scene.pictures;
      const reads = scene.choices.reads;
      const name = (row, a) => { const k = row?.labels?.[a]?.[i]; return k === undefined ? "–" : k < 0 ? "uncertain" : reads[a][k]; };
      const picture = (row, text) => {
        const from = row?.place !== undefined && sprite?.ready ? h("canvas", {}) : h("img", { src: row?.images?.[i] ?? "", alt: text });
        if (from.tagName === "CANVAS") paintCell(from, row.place, i);
        return h("figure", {}, from, h("figcaption", {}, text));
      };
      const every = Object.keys(reads).filter((a) => p.after?.labels?.[a] || a === own());
      part.large.replaceChildren(
        h("form", { method: "dialog" }, h("button", { class: "dx-close", "aria-label": "Close" }, "×")),
        h("h3", {}, `Seed ${p.seeds[i]}`),
        h("div", { class: "dx-pair" }, picture(p.before, "as the model draws it"), painting(picture(p.after, `steered, β = ${num(view.beta)}`))),
        h("table", {}, h("thead", {}, h("tr", {}, ...["read as", "before", "after"].map((t) => h("th", { scope: "col" }, t)))),
          h("tbody", {}, ...every.map((a) => {
            const [was, is] = [name(p.before, a), name(p.after, a)];
            return h("tr", { class: was === is ? "" : "dx-moved" }, h("th", { scope: "row" }, a), h("td", {}, was), h("td", {}, is));
          }))),
      );
      part.large.showModal();
    };
    // The brush: the site's map over the image; positions that are painted are steered, the others stay as they are.
    const painting = (figure) => {
      const [rows, columns] = scene.choices.grid;
      const painted = Array.from({ length: rows }, (_, y) => Array.from({ length: columns }, (_, x) => (view.where?.[y]?.[x] ?? ".") === "#"));
      const cells = [];
      let brush = null;
      const only = h("button", { type: "button", class: "dx-button", onclick: () => { part.large.close(); change({ where: painted.map((row) => row.map((on) => (on ? "#" : ".")).join("")) }); } }, "Steer only where painted");
      const all = h("button", { type: "button", class: "dx-button dx-soft", onclick: () => { part.large.close(); change({ where: null }); } }, "Steer everywhere");
      const refresh = () => { only.disabled = !painted.flat().some(Boolean); };
      const paintAt = (y, x, on) => { painted[y][x] = on; cells[y * columns + x].setAttribute("aria-checked", String(on)); refresh(); };
      const board = h("div", { class: "dx-brush", role: "group", "aria-label": "Brush: choose the positions that are steered", style: `grid-template-columns: repeat(${columns}, 1fr)` });
      for (let y = 0; y < rows; y++) for (let x = 0; x < columns; x++) {
        const cell = h("button", { type: "button", role: "checkbox", class: "dx-cell", tabindex: cells.length ? "-1" : "0", "aria-checked": String(painted[y][x]), "aria-label": `row ${y + 1}, column ${x + 1}` });
        cell.addEventListener("pointerdown", (e) => { e.preventDefault(); if (cell.hasPointerCapture(e.pointerId)) cell.releasePointerCapture(e.pointerId); brush = !painted[y][x]; paintAt(y, x, brush); });
        cell.addEventListener("pointerenter", () => { if (brush !== null) paintAt(y, x, brush); });
        cell.addEventListener("keydown", (e) => {
          const to = { ArrowRight: [y, x + 1], ArrowLeft: [y, x - 1], ArrowDown: [y + 1, x], ArrowUp: [y - 1, x] }[e.key];
          if (to) { e.preventDefault(); e.stopPropagation(); if (to[1] >= 0 && to[1] < columns) cells[to[0] * columns + to[1]]?.focus(); }
          if (e.key === " " || e.key === "Enter") { e.preventDefault(); paintAt(y, x, !painted[y][x]); }
        });
        cells.push(cell);
      }
      board.append(...cells);
      const lift = () => { brush = null; };
      board.addEventListener("pointerup", lift);
      board.addEventListener("pointerleave", lift);
      refresh();
      figure.classList.add("dx-canvas");
      figure.firstChild.after(board);
      figure.append(h("p", { class: "dx-note" }, `Brush: paint the positions of the model's ${rows} × ${columns} map where features are steered.`), h("div", { class: "dx-buttons" }, only, view.where ? all : ""));
      return figure;
    };
    part.large.addEventListener("click", (event) => { if (event.target === part.large) part.large.close(); });
    // On a phone the unedited row shows while a finger rests on the images.
    const press = (on) => root.classList.toggle("dx-pressed", on);
    part.after.addEventListener("pointerdown", (e) => { if (narrow.matches && e.pointerType === "touch") press(true); });
    for (const kind of ["pointerup", "pointercancel", "pointerleave"]) part.after.addEventListener(kind, () => press(false));
    part.after.addEventListener("contextmenu", (e) => { if (narrow.matches) e.preventDefault(); });

    // ---- the sentence, its choices, examples, options -----------------------------------------------------------
    const word = (text, title, open) =>
      h("button", { type: "button", class: "dx-word", title, "aria-haspopup": "dialog", onclick: (e) => open(e.currentTarget) }, text, h("span", { "aria-hidden": "true" }, " ▾"));
    const renderWords = () => {
      if (compact || !scene.sentence) return;
      const t = scene.sentence;
      const subject = t.subject === null ? h("b", {}, "no prompt") : word(t.subject, "Choose or type a prompt", openPrompts);
      const share = t.says ? h("b", { title: t.note }, t.says) : h("b", { class: "dx-unknown" }, "shares nobody has counted yet");
      const active = document.activeElement?.classList?.contains("dx-word") ? [...part.sentence.querySelectorAll(".dx-word")].indexOf(document.activeElement) : -1;
      part.sentence.replaceChildren(t.subject === null ? "Given " : "Asked for ", subject, ", this model draws ", share, ". Push it towards ",
        word(t.target, "Choose the people to push towards", openTargets), ". ", h("small", {}, t.perceived));
      if (active >= 0) part.sentence.querySelectorAll(".dx-word")[active]?.focus();
      renderChips();
    };
    let chipped = "";
    const renderChips = () => {
      const c = scene.choices;
      const examples = c.prompts.filter((p) => p.value !== view.prompt && p.name.startsWith("a")).slice(0, 5);
      const keeping = view.hold.map((n) => n).join(", ");
      const options = `Options: ${keeping ? `keep ${keeping} · ` : ""}${view.n_seeds} images`;
      const key = JSON.stringify([examples, options, past.length > 0, future.length > 0]);
      if (key === chipped) return;
      chipped = key;
      const chip = (text, act, more = {}) => h("button", { type: "button", class: "dx-chip", onclick: act, tabindex: "-1", ...more }, text);
      const made = [
        ...examples.map((p) => chip(p.name.replace(/^an? /, ""), () => choosePrompt(p.value), { title: p.says })),
        chip(`${options} ▾`, (e) => openOptions(e.currentTarget), { "aria-haspopup": "dialog", class: "dx-chip dx-options" }),
        chip("↶", undo, { "aria-label": "Undo", disabled: !past.length, class: "dx-chip dx-step" }),
        chip("↷", redo, { "aria-label": "Redo", disabled: !future.length, class: "dx-chip dx-step" }),
      ];
      made[0].setAttribute("tabindex", "0");
      const focused = part.chips.contains(document.activeElement) ? document.activeElement.textContent : null;
      part.chips.replaceChildren(examples.length ? h("span", { class: "dx-try" }, "Try:") : "", ...made);
      if (focused !== null) (made.find((b) => b.textContent === focused && !b.disabled) ?? made.find((b) => !b.disabled))?.focus();
    };
    const choosePrompt = (prompt) => { close(); change({ prompt }); };
    const close = () => { part.pop.hidden = true; part.pop.replaceChildren(); opener?.setAttribute("aria-expanded", "false"); const o = opener; opener = null; return o; };
    const open = (anchor, title, ...content) => {
      if (opener === anchor) { close(); return; }
      close();
      opener = anchor;
      anchor.setAttribute("aria-expanded", "true");
      part.pop.setAttribute("role", "dialog");
      part.pop.setAttribute("aria-label", title);
      part.pop.replaceChildren(...content.flat());
      part.pop.hidden = false;
      place();
      part.pop.querySelector("input:not([type=radio]), [aria-current=true], button, input")?.focus();
    };
    // Under its opener, or above where there is more room; inside the page.
    const place = () => {
      if (part.pop.hidden || !opener?.isConnected) return;
      const [a, r] = [opener.getBoundingClientRect(), root.getBoundingClientRect()];
      const [below, above] = [innerHeight - a.bottom - 14, a.top - 62];
      const up = below < Math.min(260, part.pop.scrollHeight) && above > below;
      part.pop.style.maxHeight = `${Math.max(160, up ? above : below)}px`;
      const { offsetWidth: width, offsetHeight: height } = part.pop;
      part.pop.style.left = `${clamp(a.left - r.left, 0, Math.max(0, r.width - width))}px`;
      part.pop.style.top = `${up ? a.top - r.top - height - 6 : a.bottom - r.top + 6}px`;
    };
    new ResizeObserver(() => place()).observe(part.pop);
    document.addEventListener("pointerdown", (e) => { if (!part.pop.hidden && !part.pop.contains(e.target) && !opener?.contains(e.target)) close(); });
    part.pop.addEventListener("keydown", (e) => {
      if (e.key === "Escape") { e.stopPropagation(); close()?.focus(); }
      if (e.key !== "ArrowDown" && e.key !== "ArrowUp") return;
      const all = [...part.pop.querySelectorAll("input[type=search], .dx-item")].filter((b) => b.offsetParent);
      const here = all.indexOf(document.activeElement);
      if (here < 0) return;
      e.preventDefault();
      all[clamp(here + (e.key === "ArrowDown" ? 1 : -1), 0, all.length - 1)].focus();
    });
    const openPrompts = (anchor, text = "") => {
      const list = h("div", { class: "dx-list" });
      const input = h("input", { type: "search", class: "dx-input", value: text, maxlength: "200", placeholder: "Type a prompt, or choose one", "aria-label": "Prompt" });
      const fillIn = () => {
        const typed = input.value.toLowerCase().trim();
        const hits = scene.choices.prompts.filter((p) => !typed || p.value.toLowerCase().includes(typed) || text);
        list.replaceChildren(...hits.map((p) => h("button", { type: "button", class: "dx-item", "aria-current": String(p.value === view.prompt), onclick: () => choosePrompt(p.value) },
          h("span", {}, p.name), h("small", {}, p.says))));
      };
      input.addEventListener("input", fillIn);
      input.addEventListener("keydown", (e) => { if (e.key === "Enter" && input.value.trim()) choosePrompt(input.value.trim()); });
      fillIn();
      const known = scene.choices.words;
      const more = known.length ? [h("p", { class: "dx-note" }, "Words that this model knows:"),
        h("div", { class: "dx-vocabulary" }, ...known.map((w) => h("button", { type: "button", class: "dx-chip", onclick: () => {
          input.value = `${input.value.trim()} ${w}`.trim(); input.dispatchEvent(new Event("input")); input.focus(); } }, w)))] : [];
      open(anchor, "Prompt", input, list, h("details", { open: Boolean(text) }, h("summary", {}, "Write one from known words"), ...more));
      input.focus();
    };
    // A prompt that was refused comes back with the words to write it from.
    const offerWords = (alert) => {
      if (!/never saw/.test(alert) || compact) return;
      const anchor = part.sentence.querySelector(".dx-word");
      if (anchor && part.pop.hidden) openPrompts(anchor, view.prompt ?? "");
    };
    const openTargets = (anchor) => {
      open(anchor, "Push towards", scene.choices.targets.map((g) => h("div", { class: "dx-group", role: "group", "aria-label": g.title },
        h("p", { class: "dx-note" }, g.title),
        ...g.classes.map((c) => h("button", { type: "button", class: "dx-item", "aria-current": String(g.attribute === view.attribute && c.value === view.target),
          onclick: () => { close(); aim(g.attribute, c.value); } }, c.name)))));
    };
    const aim = (attribute, target) => {
      const before = structuredClone(view);
      if (attribute === view.attribute) { view = { ...view, target, beta: scale().identity }; commit(before); return; }
      view = { prompt: view.prompt, attribute, target, n_seeds: view.n_seeds, first_seed: view.first_seed };
      keep(before);
      wait(true);
      ask({ fresh: true });
    };
    const openOptions = (anchor) => {
      const c = scene.choices;
      const field = (name, ...inner) => h("fieldset", {}, h("legend", {}, name), ...inner);
      const radio = (group, value, name, on, act, note) => h("label", { class: "dx-radio", title: note ?? "" }, h("input", { type: "radio", name: `dx-${group}`, checked: on, onchange: act }), name);
      const number = (name, value, low, high, act) => h("label", { class: "dx-number" }, name, h("input", { type: "number", class: "dx-input", value: String(value), min: String(low), max: String(high), step: "1",
        onchange: (e) => act(Number(e.target.value)) }));
      const range = () => view.window ?? [0, c.n_steps];
      const from = number("from", range()[0] + 1, 1, c.n_steps, (v) => change({ window: windowOf(v - 1, range()[1]) }));
      const to = number("to", range()[1], 1, c.n_steps, (v) => change({ window: windowOf(range()[0], v) }));
      open(anchor, "Options", h("div", { class: "dx-form" },
        field("Images", ...c.seed_counts.map((n) => radio("n", n, n, n === view.n_seeds, () => change({ n_seeds: n }))),
          number("first seed", view.first_seed, 0, 2 ** 31, (v) => change({ first_seed: v }))),
        c.holdable.length ? field("Try to keep", ...c.holdable.map((o) => h("label", { class: "dx-radio" }, h("input", { type: "checkbox", checked: view.hold.includes(o.value),
          onchange: (e) => change({ hold: e.target.checked ? [...view.hold, o.value] : view.hold.filter((x) => x !== o.value) }) }), o.name))) : "",
        field("Sampler", radio("m", "asymmetric", "asymmetric", view.sampler === "asymmetric", () => change({ sampler: "asymmetric" }), "steers the predicted image alone"),
          radio("m", "symmetric", "symmetric", view.sampler === "symmetric", () => change({ sampler: "symmetric" }), "steers the direction too")),
        field("Denoising steps", from, to, dl.stepStrip({ total: c.n_steps, range, load: () => server.strip({ view: structuredClone(view) }),
          choose: (first, stop) => { [from.lastChild.value, to.lastChild.value] = [first + 1, stop]; change({ window: windowOf(first, stop) }); } })),
        field("Features per pole", number("", view.n_features, 1, c.max_features, (v) => change({ n_features: v }))),
        h("button", { type: "button", class: "dx-button dx-soft", onclick: () => { close(); aim2(); } }, "Back to the recommended settings")));
    };
    const windowOf = (a, b) => (a === 0 && b === scene.choices.n_steps ? null : [a, b]);
    const aim2 = () => {
      const before = structuredClone(view);
      view = { prompt: view.prompt, attribute: view.attribute, target: view.target };
      keep(before);
      wait(true);
      ask({ fresh: true });
    };
    const step = (from, to) => {
      if (!from.length) return;
      to.push(structuredClone(view));
      view = from.pop();
      wait(true);
      sentence = "";
      ask();
      paint();
    };
    const undo = () => step(past, future);
    const redo = () => step(future, past);
    root.addEventListener("keydown", (e) => {
      if (!(e.ctrlKey || e.metaKey) || e.key.toLowerCase() !== "z" || e.target.matches("input[type=search], input[type=number]")) return;
      e.preventDefault();
      if (e.shiftKey) redo(); else undo();
    });

    // ---- numbers ------------------------------------------------------------------------------------------------
    const exact = () => curve?.of === "this" && curveOf === mixOf(view);
    const at = (points, beta, key) => {
      const inside = points.filter((p) => p[key] !== null);
      if (!inside.length) return null;
      if (beta <= inside[0].beta) return inside[0][key];
      for (let i = 1; i < inside.length; i++) {
        const [a, b] = [inside[i - 1], inside[i]];
        if (beta <= b.beta) return a[key] + ((b[key] - a[key]) * (beta - a.beta)) / (b.beta - a.beta);
      }
      return inside.at(-1)[key];
    };
    const around = (beta) => {
      const p = curve.points;
      const on = p.find((q) => Math.abs(q.beta - beta) < 1e-6);
      if (on) return [on, on];
      const i = p.findIndex((q) => q.beta > beta);
      return i <= 0 ? [p.at(i < 0 ? -1 : 0), p.at(i < 0 ? -1 : 0)] : [p[i - 1], p[i]];
    };
    const counts = () => {
      const k = scene.choices.classes.indexOf(view.target);
      const row = scene.pictures?.after?.labels?.[own()] ?? [];
      return [row.filter((x) => x === k).length, row.length, row.filter((x) => x < 0).length];
    };
    const effects = () => {
      const { before, after } = scene.pictures ?? {};
      const [moved, kept] = [[], []];
      for (const [name, is] of Object.entries(after?.labels ?? {})) {
        const was = before?.labels?.[name];
        if (name === own() || !was) continue;
        const both = is.map((x, i) => [was[i], x]).filter(([a, b]) => a >= 0 && b >= 0);
        const n = both.filter(([a, b]) => a !== b).length;
        if (n) moved.push([n, `${name} ${n} of ${both.length}`]); else kept.push(name);
      }
      moved.sort((a, b) => b[0] - a[0]);
      return [moved.map((m) => m[1]), kept];
    };
    let goal = null;
    const reach = (share) => {
      const p = curve.points.filter((q) => q.share !== null);
      const identity = scale().identity;
      const hits = [];
      for (let i = 1; i < p.length; i++) {
        const [a, b] = [p[i - 1], p[i]];
        if ((a.share - share) * (b.share - share) > 0 || a.share === b.share) continue;
        hits.push({ beta: a.beta + ((share - a.share) * (b.beta - a.beta)) / (b.share - a.share), from: a, to: b });
      }
      hits.sort((x, y) => Math.abs(x.beta - identity) - Math.abs(y.beta - identity));
      return hits[0] ?? null;
    };
    const goTo = (share) => {
      close();
      goal = share;
      if (exact()) seek(); else measure();
    };
    const seek = () => {
      const share = goal;
      goal = null;
      const people = scene.sentence.target;
      const hit = reach(share);
      if (!hit) {
        const best = [...curve.points].sort((a, b) => Math.abs(a.share - share) - Math.abs(b.share - share))[0];
        change({ beta: snap(best.beta) }, { sentence: `${percent(share)} ${people} is out of the slider's reach; ${percent(best.share)} at β = ${num(best.beta)} is the nearest that was measured.` });
        return;
      }
      const text = `${percent(share)} ${people} at about β = ${num(hit.beta)}: read off the curve between β = ${num(hit.from.beta)} and ${num(hit.to.beta)}, ${hit.from.n} images each.`;
      change({ beta: snap(hit.beta) }, { sentence: text });
    };
    const measure = () => {
      props.value = { view: structuredClone(view), serial, known: "" };
      measuring = { done: 0, left: "" };
      said = "";
      trigger(MEASURE);
      paint();
    };
    const openGoals = (anchor) => {
      const even = curve?.even ?? 1 / scene.choices.classes.length;
      const planted = scene.choices.planted[view.prompt]?.[scene.choices.classes.indexOf(view.target)];
      const mine = h("input", { type: "number", class: "dx-input", min: "1", max: "99", value: "30", "aria-label": "My target in percent" });
      const item = (name, note, act) => h("button", { type: "button", class: "dx-item", onclick: act }, h("span", {}, name), h("small", {}, note));
      open(anchor, "Go to", item("Even", percent(even), () => goTo(even)),
        planted === undefined ? "" : item("As in the training data", percent(planted), () => goTo(planted)),
        h("div", { class: "dx-mine" }, h("label", {}, "My target ", mine, " %"), h("button", { type: "button", class: "dx-button dx-soft", onclick: () => goTo(clamp(Number(mine.value), 0, 100) / 100) }, "Go")));
    };
    const line = (...content) => h("p", {}, ...content);
    const renderNumbers = () => {
      if (!scene.choices) return;
      const people = scene.sentence.target;
      const [k, n, undecided] = counts();
      const identity = scale().identity;
      const rows = [];
      const measured = exact();
      if (measured) {
        const [first, now] = [at(curve.points, identity, "share"), at(curve.points, view.beta, "share")];
        const [a, b] = around(view.beta);
        const one = a === b;
        const still = view.beta === identity && !Object.keys(view.own).length;
        rows.push(h("p", { class: "dx-big" }, still ? `${percent(now)} ${people}` : `${percent(first)} → ${one ? "" : "≈ "}${percent(now)} ${people}`));
        rows.push(line(one ? `counted in ${a.n} images: ${percent(a.low)} to ${percent(a.high)}, ${a.uncertain} uncertain`
          : `between β = ${num(a.beta)} (${percent(a.share)}) and ${num(b.beta)} (${percent(b.share)}), ${a.n} images each`));
        const ratios = [at(curve.points, identity, "ratio"), at(curve.points, view.beta, "ratio")];
        if (curve.two && ratios[0] !== null) {
          const c = scene.choices.classes;
          const other = c.find((x) => x !== view.target);
          const span = one && a.ratio_low !== null && a.ratio_high !== null ? ` (${signed(a.ratio_low)} to ${signed(a.ratio_high)})` : "";
          const from = still ? "" : `${signed(ratios[0])} → `;
          rows.push(line(`ln(${view.target} / ${other}) ${from}${signed(ratios[1])}${span}${a.adjusted || b.adjusted ? " *" : ""}`));
        }
      } else {
        rows.push(h("p", { class: "dx-big" }, n && !scene.pictures.draft ? `${k} of ${n} ${people}` : people));
        rows.push(line(h("b", {}, "on screen only. "), curve ? "The curve is of the recommended set, not of this mix." : "Nobody has measured this yet."));
      }
      if (n && !scene.pictures?.draft) {
        const dim = busy ? "dx-dim" : "";
        const [moved, kept] = effects();
        const many = undecided ? `, ${undecided} uncertain` : "";
        rows.push(h("p", { class: dim }, `${measured ? `on screen: ${k} of ${n}${many} · ` : ""}${n} images show what steering does, not how often${measured ? "" : many}`));
        if (steers()) rows.push(h("p", { class: dim }, h("b", {}, "side effects: "), moved.length ? `${moved.slice(0, 4).join(", ")}${kept.length ? `; ${kept.slice(0, 3).join(", ")} kept` : ""}` : "nothing else changed in these"));
        const ratio = scene.pictures.ratio;
        if (ratio && (ratio > 1.5 || ratio < 0.67)) rows.push(h("p", { class: "dx-warn" }, `pushed unusually hard (${num(ratio, 1)} ×): images may break`));
      }
      if (sentence || said) rows.push(h("p", { class: "dx-said", role: "status" }, sentence || said));
      const buttons = [];
      if (measuring) {
        rows.push(h("p", { role: "status" }, `Measuring this mix: ${percent(measuring.done ?? 0)}${measuring.left ?? ""}`), h("progress", { max: "1", value: String(measuring.done ?? 0) }));
        buttons.push(h("button", { type: "button", class: "dx-button dx-soft", onclick: () => trigger(HALT) }, "Stop"));
      } else {
        buttons.push(h("button", { type: "button", class: `dx-button dx-go${measured ? "" : " dx-soft"}`, "aria-haspopup": "dialog", onclick: (e) => openGoals(e.currentTarget) }, "Go to even", h("span", { "aria-hidden": "true" }, " ▾")));
        buttons.push(h("button", { type: "button", class: `dx-button ${measured ? "dx-soft" : ""} dx-measure`, onclick: measure, title: "Counts 48 images at seven strengths of exactly what is on screen, with as many random features beside" }, "Measure this mix"));
      }
      const focused = document.activeElement?.closest?.(".dx-buttons") ? [...document.activeElement.parentNode.children].indexOf(document.activeElement) : -1;
      part.numbers.replaceChildren(...rows, h("div", { class: "dx-buttons" }, ...buttons));
      if (focused >= 0) part.numbers.querySelectorAll(".dx-buttons button")[focused]?.focus();
    };

    // ---- the slider is the plot ---------------------------------------------------------------------------------
    const frame = () => {
      const width = part.slider.clientWidth || 560;
      const height = part.slider.clientHeight || 148;
      const { low, high } = scale();
      const [left, right, top, bottom] = [26, 26, 18, 18];
      const two = curve ? curve.two : true;
      const key = two ? "ratio" : "share";
      const values = curve ? curve.points.map((p) => p[key]).filter((v) => v !== null) : [];
      const far = Math.max(1.2, ...values.map(Math.abs)) + 0.4;
      const [y0, y1] = two ? [-far, far] : [0, 1];
      const x = (b) => left + ((b - low) / (high - low)) * (width - left - right);
      const y = (v) => height - bottom - ((clamp(v, y0, y1) - y0) / (y1 - y0)) * (height - top - bottom);
      const beta = (px) => low + ((px - left) / (width - left - right)) * (high - low);
      return { width, height, x, y, beta, key, two, even: two ? 0 : curve?.even ?? 0.5, y0, y1 };
    };
    const renderCurve = () => {
      if (!scene.scale) return;
      const f = frame();
      const { low, high, identity } = scale();
      const path = (points) => points.map(([a, b], i) => `${i ? "L" : "M"}${a.toFixed(1)} ${b.toFixed(1)}`).join("");
      const parts = [];
      const level = f.y(f.even);
      parts.push(s("line", { class: "dx-even", x1: f.x(low), x2: f.x(high), y1: level, y2: level }));
      parts.push(s("line", { class: "dx-unchanged", x1: f.x(identity), x2: f.x(identity), y1: 14, y2: f.height - 12 }));
      let here = level;
      const measured = exact();
      if (curve) {
        const points = curve.points.filter((p) => p[f.key] !== null);
        const [lowKey, highKey] = f.two ? ["ratio_low", "ratio_high"] : ["low", "high"];
        const upper = points.map((p) => [f.x(p.beta), f.y(p[highKey] ?? f.y1)]);
        const lower = points.map((p) => [f.x(p.beta), f.y(p[lowKey] ?? f.y0)]);
        const fade = measured ? "" : " dx-other";
        parts.push(s("path", { class: `dx-band${fade}`, d: `${path([...upper, ...lower.reverse()])}Z` }));
        const control = curve.control.filter((p) => p[f.key] !== null);
        if (control.length) parts.push(s("path", { class: "dx-control", d: path(control.map((p) => [f.x(p.beta), f.y(p[f.key])])) }));
        parts.push(s("path", { class: `dx-line${fade}`, d: path(points.map((p) => [f.x(p.beta), f.y(p[f.key])])) }));
        for (const p of points) parts.push(s("circle", { class: `dx-dot${fade}${p.adjusted ? " dx-adjusted" : ""}`, cx: f.x(p.beta), cy: f.y(p[f.key]), r: 3 }));
        if (measured) here = f.y(at(curve.points, view.beta, f.key) ?? f.even);
      } else {
        parts.push(s("line", { class: "dx-line dx-other", x1: f.x(low), x2: f.x(high), y1: level, y2: level }));
      }
      const up = scene.sentence?.target ?? view.target;
      const classes = scene.choices?.classes ?? [];
      const down = classes.length === 2 ? scene.choices.people[1 - classes.indexOf(view.target)] : up;
      parts.push(s("text", { class: "dx-axis", x: f.x(low) + 4, y: 14 }, `more ${up} ↑`));
      parts.push(s("text", { class: "dx-axis", x: f.x(high) - 4, y: f.height - 4, "text-anchor": "end" }, `${classes.length === 2 ? "more" : "fewer"} ${down} ↓`));
      if (!curve) parts.push(s("text", { class: "dx-axis", x: f.x(high) - 4, y: 14, "text-anchor": "end" }, "not measured yet: drag, or Measure this mix"));
      else if (!measured) parts.push(s("text", { class: "dx-axis", x: f.x(high) - 4, y: 14, "text-anchor": "end" }, "grey: the recommended set, not this mix"));
      const x = f.x(view.beta);
      parts.push(s("line", { class: "dx-drop", x1: x, x2: x, y1: here, y2: f.height - 6 }));
      parts.push(s("circle", { class: "dx-thumb", cx: x, cy: here, r: 11 }));
      if (!past.length && view.beta === identity && !dragging) {
        parts.push(s("text", { class: "dx-invite", x: x + 20, y: clamp(here + 26, 30, f.height - 16) }, "drag me →"));
      }
      part.curve.setAttribute("viewBox", `0 0 ${f.width} ${f.height}`);
      part.curve.replaceChildren(...parts);
      part.legend.textContent = curve ? `drag along the curve (band: 95 %${curve.control.length ? "; dashed: random features" : ""})` : "drag";
      renderTicks(f);
      const share = measured ? at(curve.points, view.beta, "share") : null;
      part.slider.setAttribute("aria-valuemin", String(low));
      part.slider.setAttribute("aria-valuemax", String(high));
      part.slider.setAttribute("aria-valuenow", String(view.beta));
      const name = view.beta === identity ? "unchanged" : `β ${num(view.beta)}`;
      part.slider.setAttribute("aria-valuetext", `${name}${share === null ? "" : `, about ${percent(share)} ${up}`}`);
    };
    let ticked = "";
    const renderTicks = (f) => {
      const { low, high, identity } = scale();
      const hit = exact() ? reach(curve.even) : null;
      const ticks = [[low, low < identity && low < 0 ? `reversed ${num(low)}` : num(low)], [identity, `unchanged ${num(identity)}`], [high, num(high)]];
      if (hit && Math.abs(hit.beta - identity) > (high - low) / 40) ticks.push([snap(hit.beta), `even ${num(snap(hit.beta))}`, "dx-strong"]);
      const key = JSON.stringify([ticks, f.width]);
      if (key === ticked) return;
      ticked = key;
      ticks.sort((a, b) => a[0] - b[0]);
      part.ticks.replaceChildren(...ticks.map(([beta, text, kind], i) => h("button", { type: "button", tabindex: "-1", "aria-hidden": "true", class: `dx-tick ${kind ?? ""} ${i === 0 ? "dx-first" : i === ticks.length - 1 ? "dx-last" : ""}`,
        style: `left:${((100 * f.x(beta)) / f.width).toFixed(2)}%`, onclick: () => change({ beta }) }, text)));
      // Neighbours that would overlap stand apart.
      let edge = -Infinity;
      for (const tick of part.ticks.children) {
        tick.style.marginLeft = "0px";
        const box = tick.getBoundingClientRect();
        if (box.left < edge + 6) { tick.style.marginLeft = `${edge + 6 - box.left}px`; edge = edge + 6 + box.width; } else edge = box.right;
      }
    };
    let held = null;
    const dragTo = (event) => {
      const box = part.slider.getBoundingClientRect();
      const beta = snap(frame().beta(event.clientX - box.left));
      if (beta === view.beta) return;
      view.beta = beta;
      sentence = said = "";
      moved();
    };
    part.slider.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      held = structuredClone(view);
      dragging = true;
      part.slider.setPointerCapture(event.pointerId);
      part.slider.focus({ preventScroll: true });
      root.classList.add("dx-dragging");
      dragTo(event);
    });
    part.slider.addEventListener("pointermove", (event) => { if (held) dragTo(event); });
    const release = () => {
      if (!held) return;
      const before = held;
      held = null;
      dragging = again = false;
      root.classList.remove("dx-dragging");
      if (!same(before, view)) commit(before); else paint();
    };
    for (const kind of ["pointerup", "pointercancel", "lostpointercapture"]) part.slider.addEventListener(kind, release);
    part.slider.addEventListener("keydown", (event) => {
      const { low, high, step: unit } = scale();
      const big = Math.max(unit, (high - low) / 8);
      const to = { ArrowRight: view.beta + unit, ArrowUp: view.beta + unit, ArrowLeft: view.beta - unit, ArrowDown: view.beta - unit,
        PageUp: view.beta + big, PageDown: view.beta - big, Home: low, End: high }[event.key];
      if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      keyed ??= structuredClone(view);
      const beta = snap(to);
      if (beta !== view.beta) { view.beta = beta; sentence = said = ""; dragging = true; moved(); }
      clearTimeout(typing);
      typing = setTimeout(settle, 350);
    });
    const settle = () => {
      const before = keyed;
      keyed = null;
      dragging = again = false;
      if (before && !same(before, view)) commit(before); else paint();
    };
    new ResizeObserver(() => { ticked = ""; renderCurve(); }).observe(part.slider);

    // ---- feature rows -------------------------------------------------------------------------------------------
    const strengthOf = (id) => view.own[id] ?? (scene.rowsById?.[id]?.role === "apart" ? scale().identity : view.beta);
    const setOwn = (id, value) => { view.own = { ...view.own, [id]: value }; };
    const drop = (id) => { const { [id]: _, ...rest } = view.own; view.own = rest; view.solo = view.solo.filter((x) => x !== Number(id)); };
    let extra = new Map(); // rows fetched besides the scene's, by number
    const rowList = () => {
      const rows = scene.rows?.shown ?? [];
      const byId = new Map([...extra, ...rows.map((r) => [r.id, r])]);
      scene.rowsById = Object.fromEntries(byId);
      const own = new Set([...Object.keys(view.own).map(Number), ...view.solo]);
      const every = [...byId.values()];
      const added = every.filter((r) => r.role === "apart" && own.has(r.id));
      const set = every.filter((r) => r.role !== "apart" && (r.place < rowsWanted || own.has(r.id))).sort((a, b) => a.place - b.place);
      return [...added, ...set];
    };
    let rowed = "";
    const renderRows = () => {
      if (!scene.rows) return;
      const rows = rowList();
      const missing = Object.keys(view.own).map(Number).filter((id) => !scene.rowsById[id]);
      if (missing.length) fetchRows({ ids: missing });
      const key = JSON.stringify([rows.map((r) => r.id), scene.rows.total, rowsWanted, scale(), view.attribute, view.target]);
      if (key !== rowed) {
        rowed = key;
        const all = rowsWanted >= scene.rows.total;
        const title = h("div", { class: "dx-rows-head" }, h("h3", {}, h("b", {}, `${scene.rows.total} features move together.`), ` Top ${Math.min(rowsWanted, scene.rows.total)} shown`),
          h("span", { "aria-hidden": "true" }, " · "),
          h("button", { type: "button", class: "dx-link dx-more", onclick: () => { if (all) { rowsWanted = 6; paint(); } else fetchRows({ n: Math.min(scene.rows.total, rowsWanted + 24) }, true); } }, all || rowsWanted > 6 ? (all ? "show fewer" : "show more") : "show all"),
          h("span", { "aria-hidden": "true" }, " · "),
          h("button", { type: "button", class: "dx-link dx-strong dx-add", "aria-haspopup": "dialog", onclick: (e) => openSearch(e.currentTarget) }, "+ add a feature"));
        part.features.replaceChildren(title, h("ul", { class: "dx-list-rows" }, ...rows.map(rowElement)));
      }
      for (const element of part.features.querySelectorAll(".dx-row")) refreshRow(element);
    };
    const rowElement = (row) => {
      const { low, high, step: unit, identity } = scale();
      const id = row.id;
      let before = null;
      const slider = h("input", { type: "range", min: String(low), max: String(high), step: String(unit), "aria-label": `Strength of feature ${id}: ${row.name}`,
        oninput: (e) => { before ??= structuredClone(view); dragging = true; setOwn(id, Number(e.target.value)); sentence = said = ""; moved(); },
        onchange: () => { const b = before; before = null; dragging = again = false; muted.delete(id); if (b) commit(b); } });
      const mute = h("button", { type: "button", class: "dx-mute", "aria-label": `Mute feature ${id}`, title: "Mute: leave this feature as the model has it", onclick: () => {
        const was = structuredClone(view);
        if (view.own[id] === identity) { const back = muted.get(id); if (back === undefined && row.role !== "apart") drop(id); else setOwn(id, back ?? high); muted.delete(id); }
        else { if (view.own[id] !== undefined) muted.set(id, view.own[id]); else muted.delete(id); setOwn(id, identity); }
        commit(was);
      } }, "M");
      const solo = h("button", { type: "button", class: "dx-solo", "aria-label": `Solo feature ${id}`, title: "Solo: steer this feature alone", onclick: () => {
        change({ solo: view.solo.includes(id) ? view.solo.filter((x) => x !== id) : [...view.solo, id] });
      } }, "S");
      const remove = h("button", { type: "button", class: "dx-remove", "aria-label": row.role === "apart" ? `Remove feature ${id}` : `Feature ${id} follows the main slider again`, title: row.role === "apart" ? "Remove" : "Follow the main slider again",
        onclick: () => { const was = structuredClone(view); drop(id); muted.delete(id); commit(was); } }, "×");
      return h("li", { class: "dx-row", "data-id": String(id) },
        h("span", { class: "dx-thumbs" }, ...row.thumbs.map((src) => h("img", { src, alt: "" }))),
        h("span", { class: "dx-name", title: `${row.name} · ${row.says}` }, h("b", {}, `#${id} `), row.name, h("small", {}, h("span", {}, `${row.says} · `),
          h("button", { type: "button", class: "dx-alone", title: "Draw what this feature changes alone, in this setting and on these seeds", onclick: () => tryAlone(id) }, "alone here?"))),
        slider, h("output", {}), mute, solo, remove);
    };
    // What decides what a feature does alone: all but the strengths.
    const setting = (v) => JSON.stringify([v.prompt, v.attribute, v.target, v.n_features, v.sampler, v.window, v.hold, v.n_seeds, v.first_seed, v.where]);
    const asking = []; // one after another: the next one would end the one before
    const tryAlone = (id) => {
      tried.set(setting(view) + id, "…");
      asking.push(id);
      if (asking.length === 1) nextAlone();
      renderRows();
    };
    const nextAlone = () => {
      if (!asking.length) return;
      props.value = { view: structuredClone(view), serial, known: "", alone: asking[0] };
      trigger(ALONE);
    };
    const refreshRow = (element) => {
      const id = Number(element.dataset.id);
      const [line, button] = [element.querySelector("small"), element.querySelector(".dx-alone")];
      const told = tried.get(setting(view) + id);
      const says = told ?? "alone here?";
      if (button.textContent !== says) { button.textContent = says; button.disabled = told !== undefined; line.classList.toggle("dx-told", told !== undefined); line.title = told ?? ""; }
      const { low, high, identity } = scale();
      const mine = view.own[id] !== undefined;
      const value = strengthOf(id);
      const [slider, output] = [element.querySelector("input"), element.querySelector("output")];
      if (document.activeElement !== slider || !dragging) slider.value = String(value);
      slider.style.setProperty("--dx-fill", `${(100 * (value - low)) / (high - low)}%`);
      output.textContent = num(value);
      const silenced = (mine && value === identity) || (view.solo.length > 0 && !view.solo.includes(id));
      element.classList.toggle("dx-own", mine);
      element.classList.toggle("dx-muted", silenced);
      element.querySelector(".dx-mute").setAttribute("aria-pressed", String(mine && value === identity));
      element.querySelector(".dx-solo").setAttribute("aria-pressed", String(view.solo.includes(id)));
      element.querySelector(".dx-remove").disabled = !mine && !view.solo.includes(id);
    };
    const fetchRows = async (question, widen = false) => {
      const key = JSON.stringify(question);
      if (fetching.has(key)) return;
      fetching.add(key);
      const found = await server.find({ view: structuredClone(view), ...question });
      fetching.delete(key);
      for (const row of found.rows ?? []) extra.set(row.id, row);
      if (widen) rowsWanted = question.n;
      rowed = "";
      if (found.rows?.length) renderRows();
    };
    const fetching = new Set();
    const openSearch = (anchor) => {
      const list = h("div", { class: "dx-list dx-found", role: "group", "aria-label": "Features found" });
      const input = h("input", { type: "search", class: "dx-input", placeholder: `Number or word: beard, dark skin, 716 … (${scene.choices.d_sae.toLocaleString("en")} features)`, "aria-label": "Find a feature by number or word" });
      let newest = 0;
      const look = async () => {
        const mine = ++newest;
        const text = input.value.trim();
        if (!text) { list.replaceChildren(h("p", { class: "dx-note" }, "Type what it should do (“beard”, “older”), or its number.")); return; }
        const found = await server.find({ view: structuredClone(view), text });
        if (mine !== newest) return;
        list.replaceChildren(...(found.rows.length ? found.rows.map((row) => h("button", { type: "button", class: "dx-item dx-hit", onclick: () => add(row) },
          h("span", { class: "dx-thumbs" }, ...row.thumbs.map((src) => h("img", { src, alt: "" }))), h("span", {}, h("b", {}, `#${row.id} `), row.name, h("small", {}, row.says))))
          : [h("p", { class: "dx-note" }, found.alert || "No feature is named so. Try another word, or a number.")]));
      };
      let soon = 0;
      input.addEventListener("input", () => { clearTimeout(soon); soon = setTimeout(look, 140); });
      input.addEventListener("keydown", (e) => { if (e.key === "Enter") list.querySelector(".dx-hit")?.click(); });
      open(anchor, "Add a feature", input, list);
      look();
      input.focus();
    };
    const add = (row) => {
      close();
      if (Object.keys(view.own).length >= scene.choices.max_own) { part.alert.textContent = `Up to ${scene.choices.max_own} features can have a strength of their own.`; return; }
      extra.set(row.id, row);
      rowed = "";
      const was = structuredClone(view);
      setOwn(row.id, scale().high);
      commit(was);
      part.features.querySelector(`[data-id="${row.id}"] input`)?.focus({ preventScroll: true });
    };

    // ---- everything that follows from the view ------------------------------------------------------------------
    const paint = () => {
      if (!scene.choices) return;
      const stale = picturesOf && !same({ ...picturesOf, beta: 0 }, { ...view, beta: 0 });
      const p = scene.pictures;
      const apart = Object.entries(view.own).length;
      const only = `${view.solo?.length ? `, ${view.solo.map((i) => `#${i}`).join(" and ")} alone` : ""}${view.where ? ", only where painted" : ""}`;
      const now = view.beta === scale().identity && !apart ? `Steered: unchanged so far${only}`
        : `Steered, β = ${num(view.beta)}${apart ? `, ${apart} apart` : ""}${only} — same seeds`;
      part.steered.textContent = now;
      const waiting = busy ? (said || "drawing …") : "";
      part.state.textContent = p?.draft ? `${p.draft}: not measured` : waiting || (stale ? "" : p?.book ? "stored frames" : p?.stored ? "stored images" : "");
      renderCurve();
      renderNumbers();
      renderRows();
      if (!compact) renderChips();
    };

    // ---- start --------------------------------------------------------------------------------------------------
    watch("scene", () => take(props.scene));
    watch("value", () => {
      const given = props.value;
      if (given?.from !== "server" || !given.view) return;
      const before = structuredClone(view);
      view = structuredClone(given.view);
      commit(before);
    });
    // Other tabs read the view off the component's value, of which gradio may hold an older copy by then: told anew.
    const tell = (event) => { if (!root.contains(event.target)) props.value = { view: structuredClone(view), serial, known: "" }; };
    for (const kind of ["pointerdown", "keydown"]) document.addEventListener(kind, tell, true);
    document.addEventListener("dl-theme", () => renderCurve());
    if (!compact) {
      document.addEventListener("dl-address", (event) => { wait(true); ask({ query: event.detail }); });
    }
    if (props.scene?.choices) take(props.scene);
    wait(linked || !scene.pictures);
    const link = location.search;
    // Right after it was made, gradio may still hold the component's first value: ask until the answer is to this.
    const arrive = () => {
      if (shown > 0 || serial > 3) return;
      ask(linked ? { query: link } : {});
      setTimeout(arrive, 2500);
    };
    setTimeout(arrive, 60);
    root.dataset.ready = "1";
  };
})();
