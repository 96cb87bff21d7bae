// The class: what is tapped, typed or dragged on the board or in the live pane becomes one "act" or "turn" for Python.
const values = (form) => Object.fromEntries([...new FormData(form)].filter(([, v]) => v !== ""));
const strength = (form) => form.querySelector("input[name=beta]");
const people = (input) => {
  const output = input.parentElement.querySelector("output");
  if (output) output.textContent = input.name === "beta" ? Number(input.value) : `${input.value} of 100`;
  input.parentElement.querySelector(".dl-people")?.style.setProperty("--share", input.value);
  input.setAttribute("aria-valuetext", input.name === "beta" ? `β ${input.value}` : `${input.value} of 100`);
};
const answer = (form) => {
  const kind = form.dataset.form, own = values(form);
  if (kind === "quiz") return { do: "quiz", answers: own };
  if (kind === "match") return { do: "guess", value: new FormData(form).getAll("value").map(String) };
  if (kind === "share") return { do: "guess", value: Number(own.value) };
  return { do: "guess", value: own.value ?? "", share: Number(own.share ?? 50), text: own.text ?? "", shared: !!own.shared };
};
let waiting;
const turn = (form, now) => {
  clearTimeout(waiting);
  const own = values(form);
  const wish = { key: own.key ?? "none", beta: Number(own.beta ?? 1), n: Number(own.n), hold: !!own.hold };
  waiting = setTimeout(() => trigger("turn", wish), now ? 0 : 250);
};
const print = async (button) => {
  const paper = element.querySelector(".dl-paper"), what = button.dataset.print;
  const page = await server.document(what, `${location.origin}${location.pathname}`);
  paper.hidden = false;
  paper.querySelector("iframe").srcdoc = page;
  const save = paper.querySelector(".dl-save");
  save.href = URL.createObjectURL(new Blob([page], { type: "text/html" }));
  save.download = `${what}.html`;
  paper.scrollIntoView({ block: "nearest" });
};

element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.go !== undefined) trigger("act", { do: "go", to: button.dataset.go });
  else if (button.dataset.reveal !== undefined) trigger("act", { do: "reveal" });
  else if (button.dataset.again !== undefined) trigger("act", { do: "again" });
  else if (button.dataset.print !== undefined) print(button);
  else if (button.dataset.printNow !== undefined) element.querySelector(".dl-paper iframe").contentWindow.print();
  else if (button.dataset.beta !== undefined) {
    const input = strength(button.form);
    input.value = button.dataset.beta;
    people(input);
    turn(button.form, true);
  }
});
element.addEventListener("submit", (event) => {
  event.preventDefault();
  if (event.target.matches(".dl-ask")) trigger("act", answer(event.target));
});
element.addEventListener("input", (event) => {
  if (event.target.type === "range") people(event.target);
  if (event.target.name === "share" && event.target.form) {
    const own = event.target.form.querySelector("input[value=own]");
    if (own) own.checked = true;
  }
});
element.addEventListener("change", (event) => {
  const form = event.target.closest("form.dl-live");
  if (!form) return;
  const chosen = event.target.matches("input[name=key]") ? event.target : null;
  if (chosen) {
    const input = strength(form), data = chosen.dataset;
    Object.assign(input, { min: data.low, max: data.high, step: data.step });
    input.value = data.start;
    people(input);
    form.querySelector(".dl-ends").firstElementChild.textContent = data.low;
    form.querySelector(".dl-ends").lastElementChild.textContent = data.high;
    const set = form.querySelector("[data-beta]");
    set.dataset.beta = data.start;
    set.textContent = `Set β = ${data.start}`;
  }
  turn(form, !!chosen);
});

let here = element.querySelector(".dl-class")?.dataset.place, phase;
watch("value", () => {
  const board = element.querySelector(".dl-class"), place = board?.dataset.place;
  if (!place) return;
  const told = board.querySelector("[role=alert]"), measured = board.querySelector(".dl-headline");
  const now = `${place}:${board.querySelectorAll(".dl-later").length}`;
  if (here && now !== phase) (told ?? (place === here && measured ? measured : board.querySelector(".dl-stop-title")))?.focus();
  here = place;
  phase = now;
  window.dl.remember("learn", { station: place }); // the page's address, see app.js
});
