// What a page looks like, asked by test_in_browser.py.

function rgb(colour) {
  const paint = document.createElement("canvas").getContext("2d");
  paint.fillStyle = colour;
  paint.fillRect(0, 0, 1, 1);
  return [...paint.getImageData(0, 0, 1, 1).data];
}

function luminance([r, g, b]) {
  const [x, y, z] = [r, g, b].map((v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * x + 0.7152 * y + 0.0722 * z;
}

// Of every visible text: its beginning, and its contrast with the ground of the nearest element that paints one.
// Texts on bars are left out: their ground is a shape.
function contrasts() {
  const texts = "h1,h2,h3,p,th,td,li,dt,dd,a,legend,label,summary,caption,figcaption,pre,.plot text:not(.on)";
  const out = [];
  for (const e of document.querySelectorAll(texts)) {
    if (!e.checkVisibility() || !e.textContent.trim()) continue;
    const style = getComputedStyle(e);
    let ground = e;
    while (ground && rgb(getComputedStyle(ground).backgroundColor)[3] === 0) ground = ground.parentElement;
    const ink = luminance(rgb(e instanceof SVGElement ? style.fill : style.color));
    const paper = luminance(ground ? rgb(getComputedStyle(ground).backgroundColor) : [255, 255, 255]);
    out.push([e.textContent.slice(0, 40), (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05)]);
  }
  return out;
}

// What sticks out of the window and is in no box that scrolls.
function outside() {
  const all = [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility());
  return all
    .filter((e) => !e.closest(".scroll, pre, .skip, svg") && e.getBoundingClientRect().right > innerWidth + 1)
    .map((e) => `${e.tagName} ${e.className}`);
}

// Pictures without a size, or in which nothing is painted.
function empty() {
  const painted = (svg) =>
    [...svg.querySelectorAll("rect, polyline, circle")].some((s) => s.getBoundingClientRect().width > 0);
  return [...document.querySelectorAll("svg[role=img]")]
    .filter((e) => e.checkVisibility())
    .filter((e) => e.getBoundingClientRect().width < 50 || e.getBoundingClientRect().height < 20 || !painted(e))
    .map((e) => e.textContent.slice(0, 40));
}
