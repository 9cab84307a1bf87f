// Choose and order the units that are shown, a dozen first; the page reads the same without this.
for (const form of document.querySelectorAll("form.choose")) {
  const grid = document.getElementById(form.dataset.grid);
  const said = form.querySelector("output");
  const cards = [...grid.children];
  const field = (name) => form.elements.namedItem(name);
  const fits = (card) => {
    const words = field("text").value.trim().toLowerCase().split(/\s+/);
    return words.every((word) => card.dataset.text.includes(word))
      && (!field("layer").value || card.dataset.layer === field("layer").value)
      && (!field("category").value || card.dataset.category === field("category").value)
      && (!field("status").value || card.dataset.status.split(" ").includes(field("status").value));
  };
  const number = (card, key) => (card.dataset[key] === "" ? NaN : Number(card.dataset[key]));
  const orders = {
    iou: (a, b) => number(b, "iou") - number(a, "iou"),
    p: (a, b) => number(a, "p") - number(b, "p"),
    margin: (a, b) => number(b, "margin") - number(a, "margin"),
    lost: (a, b) => number(b, "lost") - number(a, "lost"),
    concept: (a, b) => a.dataset.concept.localeCompare(b.dataset.concept),
    unit: (a, b) => a.dataset.layer.localeCompare(b.dataset.layer) || number(a, "unit") - number(b, "unit"),
  };
  const A_DOZEN = 12, more = document.getElementById("more-units");
  let room = A_DOZEN;
  const show = () => {
    const key = field("order").value;
    const last = (card) => key in card.dataset && card.dataset[key] === "";
    const sorted = [...cards].sort((a, b) => last(a) - last(b) || (last(a) ? 0 : orders[key](a, b)));
    const fitting = sorted.filter(fits);
    grid.replaceChildren(...fitting.slice(0, room));
    more.hidden = fitting.length <= room;
    said.textContent = `${Math.min(room, fitting.length)} of ${fitting.length} units${fitting.length < cards.length ? ` (${cards.length} in all)` : ""}`;
  };
  more.addEventListener("click", () => {
    const first = room;
    room += 2 * A_DOZEN;
    show();
    grid.children[first].tabIndex = -1;
    grid.children[first].focus();
  });
  addEventListener("beforeprint", () => { room = Infinity; show(); });
  form.hidden = false;
  form.addEventListener("input", () => { room = A_DOZEN; show(); });
  form.addEventListener("submit", (event) => event.preventDefault());
  show();
}
