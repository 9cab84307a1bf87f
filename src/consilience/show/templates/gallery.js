// The images of a page: their order, which are shown, and how their maps are drawn.
const Gallery = (() => {
  "use strict";
  const tools = document.getElementById("tools"), list = document.querySelector(".images");
  if (!tools || !list) return null;
  const A_PAGE = 12;
  const all = [...list.children];
  const factsOf = (one) => JSON.parse(one.dataset.numbers || "{}");
  const facts = new Map(all.map((one) => [one, factsOf(one)]));
  const visible = new Set();
  let page = 0, queued = false, kept = all;
  const field = (name) => tools.elements[name];

  function how() {
    const cut = field("cut").value;
    Object.assign(Viewer.how, {
      map: field("map").checked, mask: field("mask").checked, outline: field("outline").checked,
      opacity: field("opacity").value / 100, cut, at: field("level").value / 100,
      a: field("a") ? Number(field("a").value) : 0, b: field("b") ? Number(field("b").value) : -1,
    });
    field("level").disabled = cut === "run";
    field("at").value = cut === "run" ? "the run's own" : cut === "area" ? `${field("level").value}\u00a0% of the frame` : `${field("level").value}\u00a0% of the largest`;
    return Viewer.how;
  }

  async function draw() {
    queued = false;
    const asked = { ...how() };
    await Promise.all([...visible].map((one) => Viewer.paint(one, asked)));
    if (!queued) mean(asked);
  }
  function redraw() {
    if (queued) return;
    queued = true;
    requestAnimationFrame(draw);
  }

  let told = 0;
  async function mean(asked) {  // over the images of this page, which are unpacked for it
    const output = field("mean");
    if (!output) return;
    const mine = ++told, found = [];
    if (asked.a === asked.b) { output.textContent = "A and B are the same"; return; }
    for (const one of kept.slice(page * A_PAGE, (page + 1) * A_PAGE)) {
      const { maps } = await Viewer.open(one), a = maps.get(asked.a), b = maps.get(asked.b);
      if (mine !== told) return;
      const pair = a && b ? Viewer.overlap(a, b, asked.cut, asked.at) : {};
      if (Number.isFinite(pair.iou)) found.push(pair);
    }
    const average = (key) => found.reduce((sum, pair) => sum + pair[key], 0) / found.length;
    output.textContent = found.length ? `mean over ${found.length} image${found.length > 1 ? "s" : ""} here: IoU ${Viewer.share(average("iou"))}, chance ${Viewer.share(average("expected"))}, excess ${Viewer.share(average("excess"))}` : "no image here has both masks";
  }

  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) visible.add(entry.target); else visible.delete(entry.target);
    }
    redraw();
  }, { rootMargin: "200px" });

  // ---- order and filter

  function numberOf(one, key) {
    const known = facts.get(one);
    if (key in known) return known[key];
    const pair = [Viewer.how.a, Viewer.how.b].sort((x, y) => x - y).join("-");
    const of = known.pairs && known.pairs[pair];
    return of && key in of ? of[key] : null;
  }

  function arrange() {
    how();
    const [key, way] = (field("order") ? field("order").value : "").split(" ");
    const number = field("number") && field("number").value, right = field("right") && field("right").value;
    const least = field("least") && field("least").value, most = field("most") && field("most").value;
    const named = field("named") ? field("named").value.toLowerCase() : "";
    kept = all.filter((one) => {
      const value = number ? numberOf(one, number) : 0;
      return (!number || value !== null && (least === "" || value >= least) && (most === "" || value <= most))
        && (!right || String(facts.get(one).right) === right)
        && (!named || one.querySelector("header").textContent.toLowerCase().includes(named));
    });
    if (key) kept.sort((x, y) => {
      const a = numberOf(x, key), b = numberOf(y, key);
      if (a === null || b === null) return (a === null) - (b === null);
      return way === "down" ? b - a : a - b;
    });
    page = Math.min(page, Math.max(0, Math.ceil(kept.length / A_PAGE) - 1));
    list.replaceChildren(...kept.slice(page * A_PAGE, (page + 1) * A_PAGE));
    visible.clear();
    watcher.disconnect();  // what is put back at its place would not be seen anew
    for (const one of list.children) watcher.observe(one);
    pager.hidden = kept.length <= A_PAGE && kept.length === all.length;
    where.textContent = kept.length ? `images ${page * A_PAGE + 1} to ${Math.min(kept.length, (page + 1) * A_PAGE)} of ${kept.length}${kept.length < all.length ? ` (${all.length} in all)` : ""}` : `no image fits; there are ${all.length}`;
    back.disabled = page === 0;
    on.disabled = (page + 1) * A_PAGE >= kept.length;
    redraw();
  }

  const pager = document.createElement("nav"), back = document.createElement("button"), on = document.createElement("button"), where = document.createElement("span");
  pager.className = "pager";
  pager.setAttribute("aria-label", "Pages of images");
  back.type = on.type = "button";
  back.textContent = "\u2190 earlier"; on.textContent = "later \u2192";
  where.setAttribute("role", "status");
  pager.append(back, where, on);
  list.after(pager);
  const turn = (by) => { page += by; arrange(); tools.scrollIntoView(); };
  back.addEventListener("click", () => turn(-1));
  on.addEventListener("click", () => turn(1));

  function show(one) {
    if (!kept.includes(one)) { tools.reset(); arrange(); }
    page = Math.floor(kept.indexOf(one) / A_PAGE);
    arrange();
    one.scrollIntoView();
  }
  function follow() {
    const one = all.find((each) => each.id && `#${each.id}` === location.hash);
    if (one) show(one);
  }
  addEventListener("hashchange", follow);
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[data-pair]");
    if (link) {  // a cell of the matrix: its pair, least agreement first
      const [a, b] = link.dataset.pair.split("-");
      field("a").value = a; field("b").value = b;
      if (field("order")) field("order").value = "excess up";
      page = 0;
      arrange();
      return;
    }
    const target = event.target.closest('a[href^="#image-"]');
    if (target && target.getAttribute("href") === location.hash) follow();
  });

  const ARRANGES = new Set(["order", "number", "least", "most", "right", "named"]);
  document.addEventListener("input", (event) => {
    if (event.target.form !== tools) return;
    const name = event.target.name;
    if (ARRANGES.has(name)) page = 0;
    if (ARRANGES.has(name) || name === "a" || name === "b") arrange(); else redraw();
  });
  tools.addEventListener("submit", (event) => event.preventDefault());
  addEventListener("beforeprint", () => {
    list.replaceChildren(...kept);
    for (const image of list.querySelectorAll("img")) image.loading = "eager";
  });
  addEventListener("afterprint", arrange);
  for (const one of [tools, document.getElementById("order")]) if (one) one.hidden = false;
  Viewer.wireLarge();
  arrange();
  follow();
  return {
    redraw,
    add(one) {  // an image that comes later
      all.push(one);
      facts.set(one, factsOf(one));
      arrange();
    },
  };
})();
