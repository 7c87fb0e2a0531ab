// Tables: what every chart shows, in numbers.

const PAGE = 100;

/** Makes a table with a caption. Cells are texts, numbers or elements; long tables show more on request. */
function table(caption, head, rows, empty = "none") {
  const body = h("tbody");
  const wrap = h("div", { class: "scroll", role: "region", "aria-label": caption, tabindex: 0 });
  wrap.append(h("table", {},
    h("caption", {}, caption),
    h("thead", {}, h("tr", {}, head.map((title) => h("th", { scope: "col" }, title)))), body));
  const cell = (value, index) => {
    const numeric = typeof value === "number" || value === null;
    const shown = numeric ? number(value) : value;
    return index === 0 ? h("th", { scope: "row" }, shown) : h("td", { class: numeric ? "number" : null }, shown);
  };
  let count = 0;
  const add = () => {
    const part = rows.slice(count, count + PAGE);
    body.append(...part.map((row) => h("tr", {}, row.map(cell))));
    count += part.length;
    more.hidden = count >= rows.length;
    more.textContent = `Show more (${count} of ${rows.length})`;
  };
  const more = h("button", { type: "button", onclick: add }, "");
  add();
  if (!rows.length) body.append(h("tr", {}, h("td", { colspan: head.length, class: "muted" }, empty)));
  return [wrap, more];
}

/** A closed `details` whose content is made when it is first opened. */
function fold(summary, make) {
  const details = h("details", {}, h("summary", {}, summary));
  details.addEventListener("toggle", async () => {
    if (!details.open || details.dataset.made) return;
    details.dataset.made = "yes";
    details.append(...[await make()].flat().filter(Boolean));
  });
  return details;
}
