// Draws the figure in props.value with plotly.js from plotly's Python package; a button saves it as PNG.
const load = () => {
  window.dlPlotly ??= new Promise((done, fail) => {
    const script = document.createElement("script");
    script.src = props.plotly;
    script.onload = () => done(window.Plotly);
    script.onerror = () => { window.dlPlotly = null; fail(new Error("plotly.js did not load")); };
    document.head.append(script);
  });
  return window.dlPlotly;
};

let drawn = null;
const draw = async () => {
  const value = props.value;
  const Plotly = await load();
  const box = element.querySelector(".dl-figure");
  const png = element.querySelector(".dl-png");
  if (!box || !png) return;
  if (!value || !value.figure) {
    Plotly.purge(box);
    box.replaceChildren();
    box.removeAttribute("aria-label");
    png.hidden = true;
    drawn = null;
    return;
  }
  const { data, layout } = JSON.parse(value.figure);
  box.setAttribute("aria-label", value.alt);
  await Plotly.react(box, data, { ...layout, autosize: true }, { displaylogo: false, displayModeBar: false });
  if (drawn === box) return;
  drawn = box;
  png.hidden = false;
  png.addEventListener("click", () => {
    // On its own page a figure needs a ground, and letters that are dark on it.
    const paper = { paper_bgcolor: "#ffffff", plot_bgcolor: "#ffffff" };
    const figure = { data: box.data, layout: { ...box.layout, ...paper, width: box.offsetWidth, height: box.offsetHeight } };
    Plotly.downloadImage(figure, { format: "png", scale: 2, filename: element.id || "figure", width: box.offsetWidth, height: box.offsetHeight });
  });
  new ResizeObserver(() => { if (box.isConnected && box.offsetWidth) Plotly.Plots.resize(box); }).observe(box);
};
watch("value", draw);
if (props.value) draw();
