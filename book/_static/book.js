/* What the theme's markup leaves to assistive technology and to the keyboard. */
"use strict";

/* A formula in a line of text that is longer than the line gets one of its own, in which it scrolls. */
function formulas() {
  for (const formula of document.querySelectorAll("article mjx-container:not([display])")) {
    formula.classList.remove("wide");
    const room = formula.closest("p, li, td, dd, figcaption, div").clientWidth;
    if (room > 0 && formula.getBoundingClientRect().width > room) formula.classList.add("wide");
  }
}

/* Whatever scrolls can be scrolled with the keys. The theme sees to it once; cells that are unfolded later are not counted. */
function keyboard() {
  const boxes = "pre, .pst-scrollable-table-container, div.math, mjx-container[display], mjx-container.wide, .cell_output .text_html";
  for (const box of document.querySelectorAll(`article :is(${boxes})`)) {
    const wide = box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight;
    if (wide && ["auto", "scroll"].includes(getComputedStyle(box).overflowX)) box.tabIndex = 0;
    else if (box.tabIndex === 0) box.removeAttribute("tabindex");
  }
}

document.addEventListener("DOMContentLoaded", () => {
  // The bar with the title and the chapters is a landmark.
  const bar = document.querySelector(".bd-sidebar-primary");
  if (bar && !bar.hasAttribute("role")) {
    bar.setAttribute("role", "complementary");
    bar.setAttribute("aria-label", "Book");
  }
  // What unfolds a part of the table of contents says of which.
  for (const fold of document.querySelectorAll("nav li > details > summary")) {
    fold.setAttribute("aria-label", `Below ${fold.closest("li").querySelector("a")?.textContent.trim() ?? "this"}`);
  }
  // A list of works is read as text: its roles are deprecated, and not those of a list's parts.
  for (const work of document.querySelectorAll(".citation-list, .citation")) work.removeAttribute("role");
  // Sphinx lists the parameters of a long signature as definitions without terms.
  for (const list of document.querySelectorAll("dt.sig dl")) list.setAttribute("role", "none");
  // The corner of a table, above its row labels, is no header of anything.
  for (const corner of document.querySelectorAll("article th")) {
    if (!corner.textContent.trim() && !corner.querySelector("img, mjx-container")) corner.setAttribute("role", "cell");
  }
});

addEventListener("load", () => {
  let asked = false;
  const look = () => {
    asked = false;
    formulas();
    keyboard();
  };
  // Not from within the observer, which would see what it causes.
  const ask = () => asked || (asked = true, requestAnimationFrame(look));
  new ResizeObserver(ask).observe(document.querySelector("article") ?? document.body); // unfolding lets it grow
  document.addEventListener("toggle", ask, true);
  (window.MathJax?.startup?.promise ?? Promise.resolve()).then(ask);
});
