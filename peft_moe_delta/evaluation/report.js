"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
const colour = expert => data.colours[expert % data.colours.length];
const percent = share => (100 * share).toFixed(1) + "%";
const named = code => data.names[code] ?? code;
const unique = values => [...new Set(values)];
const options = (select, labels) => select.replaceChildren(...labels.map((text, value) => make("option", {text, value})));
// Hovering, focusing and tapping all show what an element has to say.
const tell = (element, readout, text) => {
  const say = () => { at(readout).textContent = text; };
  for (const event of ["pointerenter", "focus", "click"]) element.addEventListener(event, say);
  element.tabIndex = 0;
  element.setAttribute("aria-label", text);
};

function drawRouting(model) {
  at("routing").replaceChildren(...data.routing.filter(row => row.model === model).map(row => {
    const head = make("tr", {}, make("td"), ...row.experts.map(name => make("th", {textContent: name, scope: "col"})));
    const lines = row.layers.map((layer, index) => make("tr", {},
      make("th", {textContent: layer, scope: "row"}),
      ...row.shares[index].map((share, expert) => {
        const cell = make("td", {className: "cell", textContent: Math.round(100 * share)});
        // Never the whole colour: the number on it must be read in light and dark.
        cell.style.background = `color-mix(in srgb, ${colour(expert)} ${Math.round(60 * share)}%, var(--panel))`;
        tell(cell, "routing-readout", `${named(row.language)}, layer ${layer}, ${row.experts[expert]}: ` +
          `${percent(share)} of ${row.tokens.toLocaleString("en")} tokens; router entropy ${row.entropy[index].toFixed(2)} bits`);
        return cell;
      })));
    return make("table", {className: "map"}, make("caption", {textContent: named(row.language)}),
      make("thead", {}, head), make("tbody", {}, ...lines));
  }));
}

function drawTokens() {
  const view = data.tokens[at("token-text").value], index = Number(at("token-layer").value);
  at("token-legend").replaceChildren(...view.experts.map((name, expert) => {
    const dot = make("span", {className: "dot"});
    dot.style.background = colour(expert);
    return make("span", {}, dot, name);
  }));
  at("tokens").replaceChildren(...view.tokens.map((text, token) => {
    const shares = view.probabilities[index][token];
    const first = shares.indexOf(Math.max(...shares));
    const span = make("span", {className: "token", textContent: text});
    span.style.setProperty("--expert", colour(first));
    span.style.background = `color-mix(in srgb, ${colour(first)} ${Math.round(45 * shares[first])}%, transparent)`;
    tell(span, "token-readout", `“${text}” in layer ${view.layers[index]}: ` +
      view.experts.map((name, expert) => `${name} ${percent(shares[expert])}`).join(", "));
    return span;
  }));
}

// A table that is wider than the screen says so.
const boxes = [...document.querySelectorAll(".wide")];
const mark = () => boxes.forEach(box => box.classList.toggle("scrolls", box.scrollWidth > box.clientWidth));
addEventListener("resize", mark);
mark();

const comparisons = [...document.querySelectorAll(".comparison")];
at("reference")?.addEventListener("change", event => {
  comparisons.forEach((table, place) => { table.hidden = place !== event.target.selectedIndex; });
  mark();
});
// Paper cannot be opened.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(part => { part.open = true; }));

if (data.routing.length) {
  const models = unique(data.routing.map(row => row.model));
  options(at("routing-model"), models);
  at("routing-model").addEventListener("change", event => drawRouting(models[event.target.value]));
  drawRouting(models[0]);
}
if (data.tokens.length) {
  options(at("token-text"), data.tokens.map(view => `${named(view.language)} · ${view.model}`));
  const layers = () => {
    const view = data.tokens[at("token-text").value];
    options(at("token-layer"), view.layers);
    at("token-layer").value = Math.floor(view.layers.length / 2);
    drawTokens();
  };
  at("token-text").addEventListener("change", layers);
  at("token-layer").addEventListener("change", drawTokens);
  layers();
}
