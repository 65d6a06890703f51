"use strict";
// Search, filter, sorting and pages of the pairs. Without it, the page shows all of them.
(() => {
  const PER_PAGE = 25;
  const list = document.getElementById("pairs");
  const controls = document.getElementById("controls");
  const pages = document.getElementById("pages");
  if (!list || !controls || !pages) return;
  const field = (name) => document.getElementById(name);
  const pairs = Array.from(list.children, (element, index) => ({
    element,
    index,
    text: element.textContent.toLowerCase(),
    flags: (element.dataset.flags || "").split("|"),
    dataset: element.dataset.dataset,
    chosen: Number(element.dataset.chosen),
    rejected: Number(element.dataset.rejected),
    prompt: Number(element.dataset.prompt),
  }));
  const orders = {
    order: (a, b) => a.index - b.index,
    longest: (a, b) =>
      b.prompt + Math.max(b.chosen, b.rejected) - a.prompt - Math.max(a.chosen, a.rejected),
    shortest: (a, b) => Math.min(a.chosen, a.rejected) - Math.min(b.chosen, b.rejected),
    longer_chosen: (a, b) => b.chosen - b.rejected - (a.chosen - a.rejected),
    longer_rejected: (a, b) => b.rejected - b.chosen - (a.rejected - a.chosen),
  };
  let page = 0;

  function matching() {
    const words = field("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const flag = field("flag").value;
    const dataset = field("dataset").value;
    return pairs
      .filter((pair) => !flag || pair.flags.includes(flag))
      .filter((pair) => !dataset || pair.dataset === dataset)
      .filter((pair) => words.every((word) => pair.text.includes(word)))
      .sort((a, b) => orders[field("sort").value](a, b) || a.index - b.index);
  }

  function show() {
    const shown = matching();
    const last = Math.max(0, Math.ceil(shown.length / PER_PAGE) - 1);
    page = Math.min(page, last);
    const visible = new Set(shown.slice(page * PER_PAGE, (page + 1) * PER_PAGE));
    for (const pair of shown) list.append(pair.element);
    for (const pair of pairs) pair.element.hidden = !visible.has(pair);
    const first = shown.length ? page * PER_PAGE + 1 : 0;
    field("count").textContent =
      `${first}–${page * PER_PAGE + visible.size} of ${shown.length} pairs`;
    field("back").disabled = page === 0;
    field("next").disabled = page === last;
  }

  function goTo(hash) {
    const index = pairs.findIndex((pair) => `#${pair.element.id}` === hash);
    if (index < 0) return;
    for (const name of ["search", "flag", "dataset"]) field(name).value = "";
    field("sort").value = "order";
    page = Math.floor(index / PER_PAGE);
    show();
    pairs[index].element.open = true;
    pairs[index].element.scrollIntoView();
  }

  for (const name of ["search", "flag", "dataset", "sort"]) {
    field(name).addEventListener("input", () => {
      page = 0;
      show();
    });
  }
  for (const [name, step] of [["back", -1], ["next", 1]]) {
    field(name).addEventListener("click", () => {
      page += step;
      show();
      list.scrollIntoView();
    });
  }
  window.addEventListener("hashchange", () => goTo(location.hash));
  controls.hidden = pages.hidden = false;
  show();
  goTo(location.hash);
})();
