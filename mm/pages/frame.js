"use strict";
// Sorting of tables and values of charts. Without scripts a page has all its content all the same.
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const body = table.tBodies[0];
      const key = (row) => row.cells[column].dataset.sort ?? row.cells[column].textContent;
      const number = (text) => (text.trim() === "" ? NaN : Number(text));
      const rows = [...body.rows].map((row) => [key(row), row]);
      rows.sort(([a], [b]) => {
        const x = number(a), y = number(b);
        if (Number.isNaN(x) !== Number.isNaN(y)) return Number.isNaN(x) ? 1 : -1; // words come last
        const order = Number.isNaN(x) ? a.localeCompare(b, undefined, { numeric: true }) : x - y;
        return up ? order : -order;
      });
      body.append(...rows.map(([, row]) => row));
    });
  });
}
for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const { left, right, low, high, unit, curves } = JSON.parse(figure.dataset.chart);
  const svg = figure.querySelector("svg"), cursor = svg.querySelector(".cursor");
  const readout = figure.querySelector(".readout");
  const xs = [...new Set(curves.flatMap((curve) => curve.x))].sort((a, b) => a - b);
  if (!xs.length) continue;
  let at = 0;
  const nearest = (values, x) => values.reduce((best, v, i) => (Math.abs(v - x) < Math.abs(values[best] - x) ? i : best), 0);
  const show = () => {
    const x = left + ((xs[at] - low) / (high - low || 1)) * (right - left);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.style.visibility = "visible";
    const values = curves.filter((curve) => curve.x.length).map((curve) => {
      const y = curve.y[nearest(curve.x, xs[at])];
      return (curves.length > 1 ? curve.name + " " : "") + Number(y).toPrecision(4);
    });
    readout.textContent = `${unit} ${xs[at]}: ${values.join(", ")}`;
  };
  const hide = () => { cursor.style.visibility = "hidden"; };
  svg.setAttribute("tabindex", "0");
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    at = nearest(xs, low + ((x - left) / (right - left)) * (high - low));
    show();
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -xs.length, End: xs.length }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    at = Math.max(0, Math.min(xs.length - 1, at + move));
    show();
  });
}
