// Draws the figure in props.value with plotly.js from plotly's Python package; a click on a point triggers "point".
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
  if (!box) return;
  if (!value || !value.figure) {
    Plotly.purge(box);
    box.replaceChildren();
    box.removeAttribute("aria-label");
    drawn = null;
    return;
  }
  const { data, layout } = JSON.parse(value.figure);
  box.setAttribute("aria-label", value.alt);
  await Plotly.react(box, data, { ...layout, autosize: true }, { displaylogo: false, displayModeBar: false });
  if (drawn === box) return;
  drawn = box;
  box.on("plotly_click", (event) => {
    const custom = event.points[0]?.customdata;
    if (Array.isArray(custom)) trigger("point", { id: Number(custom[0]) });
  });
  new ResizeObserver(() => { if (box.isConnected && box.offsetWidth) Plotly.Plots.resize(box); }).observe(box);
};
watch("value", draw);
if (props.value) draw();
