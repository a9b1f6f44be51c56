"use strict";
// Long names break behind a character that joins their words (exact_|match, data.|eval_|path), and not amid a word.
const JOINT = /(?<=[\w\])][_/=:+]|[A-Za-z0-9\])][.,])(?=[A-Za-z[(])/;
const EXPONENT = /(\w*\de-\d+)/;  // a browser breaks 1e-3 behind its minus
const textsWith = (isFound) => {
  const texts = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
  const found = [];
  while (texts.nextNode()) {
    const isProse = !texts.currentNode.parentElement.closest("pre, script, style, svg, select, textarea");
    if (isProse && isFound(texts.currentNode.data)) found.push(texts.currentNode);
  }
  return found;
};
const keepExponents = () => {
  for (const text of textsWith((data) => EXPONENT.test(data))) {
    const parts = text.data.split(EXPONENT).map((part, place) => {
      if (place % 2 === 0) return part;
      const whole = document.createElement("span");
      whole.className = "unbroken";
      whole.textContent = part;
      return whole;
    });
    text.replaceWith(...parts);
  }
};
const breakNames = () => {
  for (const text of textsWith((data) => /\S{10}/.test(data) && JOINT.test(data))) {
    const parts = text.data.split(JOINT).flatMap((part) => [document.createElement("wbr"), part]);
    text.replaceWith(...parts.slice(1));
  }
};
keepExponents();
breakNames();
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.querySelectorAll("th[data-column]")];
  headings.forEach((heading, column) => heading.querySelector("button").addEventListener("click", () => {
    const down = heading.getAttribute("aria-sort") === "ascending";
    headings.forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => row.cells[column].dataset.value;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === "");  // what has no value stays last
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return down ? -order : order;
    });
    table.tBodies[0].append(...rows);
  }));
}
for (const command of document.querySelectorAll(".command")) {
  if (!navigator.clipboard) break;  // a browser may deny it to a file
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.setAttribute("aria-label", "Copy: " + command.textContent.trim());
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(command.querySelector("pre").textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(command.querySelector("pre"));
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
  command.append(button);
}
const showScrollHints = () => {
  for (const box of document.querySelectorAll(".scroll")) {
    const hint = box.nextElementSibling;
    if (hint && hint.classList.contains("scroll-hint")) hint.hidden = box.scrollWidth <= box.clientWidth + 1;
  }
};
addEventListener("resize", showScrollHints);
document.addEventListener("toggle", showScrollHints, true);
showScrollHints();

const plots = {};  // Vega's views by the id of their figure
if (window.vegaEmbed) {
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  const isDark = matchMedia("(prefers-color-scheme: dark)");
  const theme = () => {
    const ink = style("ink"), soft = style("soft"), line = style("line");
    const tones = {};
    for (const tone of ["good", "bad", "warning", "note", "soft", "ink"]) tones[tone] = {fill: style(tone), stroke: style(tone), color: style(tone)};
    tones.best = {stroke: style("ink"), color: style("ink")};
    return {
      background: null,
      font: "system-ui, sans-serif",
      view: {stroke: line},
      axis: {labelColor: soft, titleColor: ink, gridColor: line, domainColor: soft, tickColor: soft, labelFontSize: 12, titleFontSize: 12},
      legend: {labelColor: ink, titleColor: ink, labelFontSize: 12, orient: "top", columns: innerWidth < 640 ? 1 : 3, symbolStrokeWidth: 2.5},
      header: {labelColor: ink, titleColor: ink}, title: {color: ink}, text: {color: ink}, rule: {color: soft},
      mark: {color: isDark.matches ? "#56b4e9" : "#0072b2"},
      style: tones,
      // The first three are Okabe and Ito's. With deuteranopia or protanopia no two look more alike than two of their eight do
      // (tests/pages/test_colours.py); black, or white, is left to texts.
      range: {category: isDark.matches
        ? ["#56b4e9", "#e69f00", "#2cc295", "#8b5cf6", "#ffffa6", "#d9442f", "#4f7979", "#f0d0e0"]
        : ["#0072b2", "#d55e00", "#009e73", "#3b1f6b", "#aa3377", "#7f8fa9", "#661100", "#00473b"]},
    };
  };
  const fitted = (spec, width) => {  // plots beneath each other cannot be fitted by Vega: their axes are left room
    const copy = structuredClone(spec);
    if (copy.vconcat) copy.vconcat.forEach((part) => { part.width = Math.max(width - 86, 160); });
    else if (!copy.hconcat && !copy.facet && !copy.repeat) {
      copy.width = width;
      copy.autosize = {type: "fit-x", contains: "padding"};
    }
    return copy;
  };
  const keepChoices = (spec, view) => {  // what the reader has chosen in the menus of the plot that is replaced
    for (const param of spec.params || []) if (param.bind && param.bind.input) param.value = view.signal(param.name);
  };
  const MENUS = "select, input, summary";
  const focusedMenu = (drawing) => [...drawing.querySelectorAll(MENUS)].indexOf(document.activeElement);
  const draw = async (anew) => {
    for (const figure of document.querySelectorAll("figure.plot")) {
      const drawing = figure.querySelector(".drawing"), old = plots[figure.id];
      if (!drawing.clientWidth || (old && !anew)) continue;  // in a folded part: drawn when it is opened
      const spec = JSON.parse(figure.querySelector("script").textContent);
      spec.description = figure.querySelector("h2").textContent;
      const focused = focusedMenu(drawing);
      if (old) {
        keepChoices(spec, old.view);
        old.finalize();
      }
      plots[figure.id] = await vegaEmbed(drawing, fitted(spec, drawing.clientWidth), {renderer: "svg", config: theme(), mode: "vega-lite",
        actions: {export: true, source: false, compiled: false, editor: false}});
      drawing.querySelector("details > summary")?.setAttribute("aria-label", "Save this plot: " + spec.description);
      if (focused >= 0) drawing.querySelectorAll(MENUS)[focused]?.focus();  // whoever was in a menu stays in it
    }
  };
  let drawn = draw(false), width = innerWidth, waiting = 0, draws = 0;
  // A plot's menus are replaced when it is drawn anew. aria-busy tells it to screen readers until that has happened.
  const setBusy = (isBusy) => document.querySelectorAll("figure.plot").forEach((figure) => figure.setAttribute("aria-busy", isBusy));
  const again = (anew) => {
    draws += 1;
    setBusy(true);
    drawn = drawn.then(() => draw(anew)).finally(() => { draws -= 1; if (!draws && !waiting) setBusy(false); });
  };
  isDark.addEventListener("change", () => again(true));
  document.addEventListener("toggle", (event) => { if (event.target.querySelector("figure.plot")) again(false); }, true);
  addEventListener("resize", () => {
    if (innerWidth === width) return;  // a phone's address bar changes the height alone
    width = innerWidth;
    setBusy(true);
    clearTimeout(waiting);
    waiting = setTimeout(() => { waiting = 0; again(true); }, 200);
  });
}
