// The slider of a notebook: a viewer whose settings and numbers Python shares.
export default {
  render({ model, el }) {
    const place = document.createElement("div");
    place.className = "consilience";
    place.innerHTML = `<form class="tools plain"><label><input type="checkbox" name="mask"> mask</label>
      <label>cut <select name="cut"><option value="run">usual</option><option value="area">same area</option><option value="share">share of the largest</option></select></label>
      <label class="range"><span>at <output></output></span> <input type="range" name="level" min="1" max="99"></label></form>
      <article class="image"><ul class="tiles">${model.get("tiles")}</ul></article>`;
    const form = place.querySelector("form"), article = place.querySelector("article");
    let queued = false;
    async function draw() {
      queued = false;
      const how = {
        ...Viewer.how, mask: form.elements.mask.checked, cut: model.get("cut"), at: model.get("level") / 100, a: model.get("a"), b: model.get("b"),
      };
      form.elements.cut.value = how.cut;
      form.elements.level.value = model.get("level");
      form.querySelector("output").value = how.cut === "run" ? "the usual cut" : `${model.get("level")} %`;
      const found = await Viewer.paint(article, how);
      if (!found) return;
      const number = (value) => Number.isFinite(value) ? value : null;
      model.set("iou", number(found.iou));
      model.set("expected", number(found.expected));
      model.set("excess", number(found.excess));
      model.save_changes();
    }
    const redraw = () => { if (!queued) { queued = true; requestAnimationFrame(draw); } };
    form.addEventListener("input", () => {
      model.set("cut", form.elements.cut.value);
      model.set("level", Number(form.elements.level.value));
      model.save_changes();
      redraw();
    });
    for (const name of ["cut", "level", "a", "b"]) model.on(`change:${name}`, redraw);
    el.append(place);
    redraw();
  },
};
