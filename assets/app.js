// The frame of the page: its bar, theme, addresses and keyboard. What each tab shows is drawn by the tab.
(() => {
  const dl = (window.dl ??= {});
  const TABS = "#dl-bar-tabs [role=tablist]";
  const INNER = "#dl-measure > .tab-wrapper [role=tablist]";

  // ---- theme: the visitor's choice goes before gradio's -------------------------------------------------------
  const stored = () => { try { return localStorage.getItem("dl-theme"); } catch { return null; } };
  const paint = () => {
    const choice = new URLSearchParams(location.search).get("__theme") ? null : stored();
    if (choice && document.body) document.body.classList.toggle("dark", choice === "dark");
  };
  dl.switchTheme = () => {
    const dark = !document.body.classList.contains("dark");
    document.body.classList.toggle("dark", dark);
    try { localStorage.setItem("dl-theme", dark ? "dark" : "light"); } catch { /* private windows keep nothing */ }
    document.dispatchEvent(new CustomEvent("dl-theme"));
  };

  // ---- words said to everyone, screen readers too -------------------------------------------------------------
  dl.say = (text) => {
    const toast = document.querySelector("#dl-toast");
    if (!toast) return;
    toast.textContent = text;
    toast.classList.add("dl-on");
    clearTimeout(dl.saying);
    dl.saying = setTimeout(() => toast.classList.remove("dl-on"), 2600);
  };
  dl.share = () => {
    const copied = navigator.clipboard?.writeText(location.href) ?? Promise.reject();
    copied.then(() => dl.say("Link copied. It opens exactly this view."), () => window.prompt("Copy this link", location.href));
  };

  // ---- tabs: gradio's own list stands in the bar; one tab stop, arrows between them ---------------------------
  const buttons = (list) => [...(document.querySelector(list)?.querySelectorAll("button[role=tab]") ?? [])];
  const named = (id) => [...buttons(TABS), ...buttons(INNER)].find((b) => b.dataset.tabId === id);
  const chosen = (list) => buttons(list).find((b) => b.getAttribute("aria-selected") === "true")?.dataset.tabId;
  const MEASURE = "measure";
  dl.tab = () => (chosen(TABS) === MEASURE ? chosen(INNER) ?? null : chosen(TABS) ?? "explore");

  const rove = (list) => {
    for (const button of buttons(list)) {
      const tabindex = button.getAttribute("aria-selected") === "true" ? "0" : "-1";
      if (button.getAttribute("tabindex") !== tabindex) button.setAttribute("tabindex", tabindex);
    }
  };
  document.addEventListener("keydown", (event) => {
    const group = event.target.closest?.("[role=tablist], [data-rove]");
    if (!group || event.ctrlKey || event.altKey || event.metaKey) return;
    const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };
    if (!(event.key in steps)) return;
    const all = [...group.querySelectorAll("button, a, summary")].filter((b) => b.offsetParent);
    const here = all.indexOf(event.target);
    if (here < 0) return;
    event.preventDefault();
    const step = steps[event.key];
    const next = Number.isFinite(step) ? (here + step + all.length) % all.length : step < 0 ? 0 : all.length - 1;
    for (const b of all) b.setAttribute("tabindex", b === all[next] ? "0" : "-1");
    all[next].focus();
    if (group.getAttribute("role") === "tablist") all[next].click();
  });

  // ---- addresses: one for each tab, and for what is drawn in Explore ------------------------------------------
  let restoring = false;
  let here = null;
  const addresses = { explore: location.search.includes("v=") ? location.search : "" };
  const search = (tab) => (tab === "explore" ? addresses.explore : addresses[tab] ?? `?tab=${tab}`);
  // A tab's own address, e.g. dl.remember("atlas", { feature: 716 }): kept, and shown while the tab is.
  dl.remember = (tab, values, query = null) => {
    addresses[tab] = query ?? `?${new URLSearchParams({ tab, ...values })}`;
    if (dl.tab() === tab) history.replaceState({ tab }, "", location.pathname + search(tab));
  };
  // Clicks until it helps: gradio's buttons stand before they work, and a tab under Measure comes after its roof.
  dl.go = async (id) => {
    for (let i = 0; i < 60 && dl.tab() !== id; i++) {
      const button = named(id);
      const roof = !button || button.closest("#dl-measure") ? named(MEASURE) : null;
      if (roof && roof.getAttribute("aria-selected") !== "true") roof.click();
      button?.click();
      if (dl.tab() !== id) await new Promise((done) => setTimeout(done, 50));
    }
  };
  const follow = () => {
    rove(TABS);
    rove(INNER);
    const tab = dl.tab();
    if (tab === null) { setTimeout(follow, 50); return; } // the list under Measure is being built
    if (tab === here) return;
    const first = here === null;
    here = tab;
    document.body.dataset.dlTab = tab;
    if (!first && !restoring) history.pushState({ tab }, "", location.pathname + search(tab));
    window.scrollTo(0, 0);
  };
  const asked = () => new URLSearchParams(location.search).get("tab") ?? "explore";
  window.addEventListener("popstate", async () => {
    restoring = true;
    const tab = asked();
    if (tab !== dl.tab()) await dl.go(tab);
    if (tab === "explore" && location.search !== addresses.explore) {
      addresses.explore = location.search;
      document.dispatchEvent(new CustomEvent("dl-address", { detail: location.search }));
    }
    setTimeout(() => { follow(); restoring = false; }, 60);
  });

  // ---- once gradio has drawn the page -------------------------------------------------------------------------
  const settle = () => {
    const bar = document.querySelector("#dl-bar-tabs");
    const list = document.querySelector("#dl-tabs > .tab-wrapper");
    if (bar && list?.querySelector("[role=tab]")) bar.append(list);
    return buttons(TABS).length > 0;
  };
  const open = async () => {
    paint();
    const wanted = asked();
    const watch = new MutationObserver(follow);
    const attributeFilter = ["aria-selected"];
    watch.observe(document.querySelector("#dl-bar-tabs"), { subtree: true, childList: true, attributes: true, attributeFilter });
    document.addEventListener("click", (event) => {
      if (event.target.closest?.("#dl-measure [role=tab]")) setTimeout(follow);
    });
    follow();
    if (wanted === dl.tab()) return;
    addresses[wanted] = location.search;
    restoring = true;
    await dl.go(wanted);
    setTimeout(() => { follow(); restoring = false; }, 60);
  };
  const start = () => {
    paint();
    const wait = new MutationObserver(() => {
      if (!settle()) return;
      wait.disconnect();
      open();
    });
    wait.observe(document.documentElement, { childList: true, subtree: true });
  };
  if (document.body) start();
  else document.addEventListener("DOMContentLoaded", start);
})();

// Enter or space on a cell of the atlas table chooses its row, as a click does: gradio tells of clicks alone.
document.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" && event.key !== " ") return;
  const cell = event.target.closest?.("#dl-atlas-table [role=gridcell]");
  if (!cell) return;
  event.preventDefault();
  event.stopPropagation();
  for (const type of ["mousedown", "mouseup", "click"]) cell.dispatchEvent(new MouseEvent(type, { bubbles: true }));
}, true);

// gradio labels the table's search box by its title alone.
new MutationObserver(() => {
  const box = document.querySelector("#dl-atlas-table .search-input:not([aria-label])");
  if (box) box.setAttribute("aria-label", "Search the features");
}).observe(document.documentElement, { childList: true, subtree: true });
