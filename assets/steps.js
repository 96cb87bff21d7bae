// The denoising steps of one seed as a strip, noise first: a click moves the nearer end of the steered range there.
(() => {
  const dl = (window.dl ??= {});

  // total: steps of a run. range(): [first, stop). load(): the strip, asked of the server. choose(first, stop).
  dl.stepStrip = ({ total, range, load, choose }) => {
    const root = document.createElement("div");
    const row = document.createElement("div");
    const says = document.createElement("small");
    root.className = "dx-strip";
    row.className = "dx-strip-row";
    row.setAttribute("role", "group");
    row.setAttribute("aria-label", "Denoising steps, from noise to image");
    row.dataset.rove = "";
    row.setAttribute("aria-busy", "true");
    says.textContent = "drawing the steps of one image …";
    says.setAttribute("role", "status");
    root.append(row, says);
    for (let i = 0; i < Math.min(total, 16); i++) row.append(document.createElement("i"));

    const mark = () => {
      const [first, stop] = range();
      for (const b of row.querySelectorAll("button")) {
        const [from, to] = [Number(b.dataset.from), Number(b.dataset.to)];
        const on = from < stop && to > first;
        b.setAttribute("aria-pressed", String(on));
      }
      const all = first === 0 && stop === total;
      says.textContent = all ? `Steered in all ${total} steps. Click a picture to narrow the range.` : `Steered in steps ${first + 1} to ${stop} of ${total}.`;
    };
    const click = (from, to) => {
      let [first, stop] = range();
      if (from < first) first = from;
      else if (to > stop) stop = to;
      else if (from - first <= stop - to) first = from === first && to < stop ? to : from;
      else stop = to === stop && from > first ? from : to;
      choose(first, stop);
      mark();
    };
    load().then((found) => {
      row.removeAttribute("aria-busy");
      if (!found.images) { row.replaceChildren(); says.textContent = found.alert ?? ""; return; }
      row.replaceChildren(...found.images.map((src, i) => {
        const [from, to] = [found.steps[i], found.steps[i + 1] ?? total];
        const button = document.createElement("button");
        const image = document.createElement("img");
        image.src = src;
        image.alt = "";
        button.type = "button";
        button.tabIndex = i ? -1 : 0;
        button.dataset.from = String(from);
        button.dataset.to = String(to);
        const name = to - from > 1 ? `Steps ${from + 1} to ${to}` : `Step ${from + 1}`;
        button.setAttribute("aria-label", `${name} of ${total}`);
        button.title = name;
        button.append(image);
        button.addEventListener("click", () => click(from, to));
        return button;
      }));
      mark();
    });
    return root;
  };
})();
