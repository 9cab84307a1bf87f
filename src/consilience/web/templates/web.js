// The workbench's pages. All talk to the server goes through the same interface that scripts use.
(() => {
  "use strict";
  const state = JSON.parse(document.getElementById("state").textContent);
  const byId = (id) => document.getElementById(id);
  const made = (tag, text, more = {}) => Object.assign(document.createElement(tag), { textContent: text ?? "" }, more);

  // A name that may be broken after its marks, and nowhere else while it fits.
  function named(tag, text, more = {}) {
    const one = made(tag, "", more);
    for (const part of text.split(/(?<=[_./-])/)) one.append(part, document.createElement("wbr"));
    return one;
  }

  async function call(method, path, body, headers = {}) {
    const json = body !== undefined && !(body instanceof Blob);
    const answer = await fetch(path, {
      method, body: json ? JSON.stringify(body) : body,
      headers: { "X-Consilience": "page", ...(json ? { "Content-Type": "application/json" } : {}), ...headers },
    });
    const told = await answer.json().catch(() => ({}));
    if (!answer.ok) throw new Error(told.error || `the server said ${answer.status}`);
    return told;
  }

  // How far each piece of work is, and how long the rest may take at the pace so far.
  const begun = new Map();
  function bars(place, tasks) {
    const now = performance.now();
    const left = ({ label, done, total }) => {
      const first = begun.get(label);
      if (!first || first.total !== total || done < first.done) begun.set(label, { done, total, at: now });
      const { done: from, at } = begun.get(label);
      if (done <= from || now - at < 1500) return "";
      const seconds = (now - at) / (done - from) * (total - done) / 1000;
      return `, about ${seconds < 90 ? `${Math.ceil(seconds)} s` : `${Math.round(seconds / 60)} min`} left`;
    };
    place.replaceChildren(...tasks.map(({ label, done, total }) => {
      const line = made("div", "", { className: "bar" });
      const bar = made("progress", "", { max: total || 1, value: done });
      bar.setAttribute("aria-label", label);
      line.append(made("span", label), bar, made("span", `${done} of ${total}${left({ label, done, total })}`));
      return line;
    }));
  }

  // ---- home: images, methods, go

  function home() {
    const form = byId("asking"), chosen = byId("chosen"), go = byId("go"), said = byId("said"), drop = byId("drop");
    const images = [];
    const header = (name) => String.fromCharCode(...new TextEncoder().encode(name)).replace(/[\r\n]/g, " ").slice(0, 300);

    function line(name) {
      const item = made("li"), picture = made("img", "", { alt: "" });
      item.append(picture, named("span", name));
      chosen.append(item);
      return item;
    }
    function take(one, item) {
      images.push(one);
      item.querySelector("img").src = one.small;
      item.querySelector("img").alt = one.name;
      const row = made("div", "", { className: "row" }), away = made("button", "remove", { type: "button" });
      away.setAttribute("aria-label", `remove ${one.name}`);
      away.addEventListener("click", () => { images.splice(images.indexOf(one), 1); item.remove(); show(); });
      row.append(made("a", "ask", { href: `/ask/${one.image}` }), away);
      item.append(row, ...(one.notes || []).map((note) => made("small", note)));
      show();
    }
    async function add(files) {
      for (const file of files) {
        const item = line(file.name || "pasted");
        try {
          take(await call("POST", "/api/images", file, { "X-Name": header(file.name || "pasted") }), item);
          if (files.length === 1 && images.length === 1 && form.elements["at-once"].checked && spelled().length) await start();
        } catch (error) {
          item.querySelector("img").remove();
          item.append(made("span", `: ${error.message}`, { className: "bad" }));
        }
      }
    }

    function spelled() {
      const list = [];
      for (const item of byId("methods").children) {
        if (!item.querySelector("[name=by]").checked) continue;
        const name = item.dataset.name, options = [...item.querySelectorAll(".options input")].filter((one) => one.value.trim());
        const text = options.map((one) => `${one.name}=${one.value.trim()}`);
        list.push(name + (text.length ? `:${text.join(",")}` : ""));
        const seed = item.querySelector(".options input[name=seed]");
        if (form.elements.again.checked && seed) {
          const other = Number(seed.value || seed.placeholder || 0) + 1;
          list.push(`${name}:${[...text.filter((one) => !one.startsWith("seed=")), `seed=${other}`].join(",")}`);
        }
      }
      return list;
    }
    function show() {
      const by = spelled();
      go.disabled = !images.length || !by.length;
      const quote = (text) => /^[\w.,:=+\/-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
      const target = form.elements.target.value;
      byId("command").textContent = ["consilience explain", ...(images.length ? images.map((one) => quote(one.name)) : ["IMAGES"]), "-m", quote(form.elements.model.value), ...by.map((one) => `--by ${quote(one)}`), ...(target && target !== "predicted" ? ["--target", quote(target)] : [])].join(" ");
    }
    async function start() {
      go.disabled = true;
      said.textContent = "asked …";
      try {
        const view = form.elements.view.value;
        const job = await call("POST", "/api/explanations", {
          images: images.map((one) => one.image), by: spelled(), model: form.elements.model.value,
          target: form.elements.target.value || "predicted", ...(view ? { view } : {}),
          also_models: form.elements["also-model"]?.value ? [form.elements["also-model"].value] : [],
          also_targets: form.elements["also-target"].value.trim() ? [form.elements["also-target"].value.trim()] : [],
        });
        location.assign(job.page);
      } catch (error) {
        said.textContent = error.message;
        go.disabled = false;
      }
    }

    form.addEventListener("submit", (event) => { event.preventDefault(); start(); });
    form.addEventListener("input", show);
    byId("files").addEventListener("change", (event) => add([...event.target.files]));
    for (const kind of ["dragenter", "dragover"]) addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
    for (const kind of ["dragleave", "drop"]) addEventListener(kind, (event) => { event.preventDefault(); drop.classList.remove("over"); });
    addEventListener("drop", (event) => add([...event.dataTransfer.files]));
    addEventListener("paste", (event) => { if (event.clipboardData.files.length) add([...event.clipboardData.files]); });
    let all = false;
    const usual = new Set([...byId("methods").children].filter((one) => !one.hidden));
    function find() {
      const words = byId("find").value.toLowerCase().trim().split(/\s+/).filter(Boolean);
      for (const item of byId("methods").children) {
        const fits = words.every((word) => item.dataset.text.includes(word));
        item.hidden = words.length ? !fits : !(all || usual.has(item) || item.querySelector("[name=by]").checked);
      }
    }
    byId("score").addEventListener("click", async () => {
      try { location.assign((await call("POST", "/api/planted", { by: spelled() })).page); }
      catch (error) { said.textContent = error.message; }
    });
    byId("find").addEventListener("input", find);
    byId("all-methods").addEventListener("click", (event) => { all = !all; event.target.textContent = all ? "Show fewer methods" : `Show all ${byId("methods").children.length} methods`; find(); });
    const asked = new URLSearchParams(location.search);
    for (const number of asked.getAll("image")) {
      call("GET", `/api/images/${encodeURIComponent(number)}/frame?model=${encodeURIComponent(form.elements.model.value)}`)
        .then((one) => take({ image: number, name: one.name || "image", small: one.image }, line(one.name || "image")))
        .catch((error) => { said.textContent = error.message; });
    }
    show();
  }

  // ---- a job as it goes

  function job() {
    const articles = new Map(), list = document.querySelector(".images"), notes = byId("notes");
    const uploads = state.job.uploads || [], columns = state.columns || [];
    const source = new EventSource(`/api/jobs/${state.job.job}/events`);
    const on = (kind, what) => source.addEventListener(kind, (event) => what(JSON.parse(event.data)));
    const cancel = byId("cancel");

    function show(name, waiting) {
      byId("job-state").textContent = name === "waiting" && waiting ? `waiting behind ${waiting}` : name;
      cancel.hidden = !["waiting", "running"].includes(name);
      document.body.dataset.state = name;
    }
    on("state", (told) => show(told.state, told.waiting));
    on("progress", (told) => bars(byId("bars"), told.tasks));
    on("said", (told) => notes.append(made("li", told.text)));
    on("failure", (told) => notes.append(made("li", `${told.image}: ${told.reason}`)));
    on("image", (told) => {
      const one = document.createElement("article");
      one.className = "card image";
      one.id = `image-${told.image + 1}`;
      one.dataset.numbers = JSON.stringify({ probability: told.probability });
      const head = made("header"), heading = named("h3", told.name);
      head.append(heading);
      if (told.predicted) {
        const line = made("p", "predicted ");
        line.append(made("b", told.predicted), told.probability === null ? "" : ` with probability ${Viewer.percent(told.probability)}`);
        head.append(line);
      }
      if (uploads[told.image]) {
        const offer = made("p", "", { className: "offer" });
        offer.append(made("a", "ask the network about it", { href: `/ask/${uploads[told.image]}?model=${encodeURIComponent(state.job.asked.models[0])}` }));
        head.append(offer);
      }
      one.append(head, ...(told.notes.length ? [made("p", told.notes.join("; "), { className: "soft" })] : []), made("ul", "", { className: "tiles" }));
      one.querySelector(".tiles").innerHTML = told.html;
      for (const [place, name] of columns.entries()) {
        const wait = made("li", "", { className: "tile" });
        wait.dataset.waits = place;
        wait.append(made("h4", name), made("div", "waiting …", { className: "pending" }), made("div", "", { className: "foot" }));
        one.querySelector(".tiles").append(wait);
      }
      articles.set(told.image, one);
      if (Gallery) Gallery.add(one);
    });
    on("tile", (told) => {
      const one = articles.get(told.image), holder = document.createElement("template");
      holder.innerHTML = told.html.trim();
      const tile = holder.content.firstElementChild, waits = one.querySelector(`[data-waits="${told.column}"]`);
      if (waits) waits.replaceWith(tile); else one.querySelector(".tiles").append(tile);
      tile.dataset.seconds = told.seconds;
      performance.mark(`tile-${told.image}-${told.column}`);
      if (Gallery) Gallery.redraw();
    });
    on("end", (told) => {
      source.close();
      show(told.state);
      bars(byId("bars"), []);
      if (told.state === "running") return;
      if (told.reason) { byId("job-reason").hidden = false; byId("job-reason").textContent = told.reason; }
      for (const wait of document.querySelectorAll("[data-waits] .pending")) wait.textContent = told.state === "done" ? "none" : told.state;
      if (told.state !== "done") return;
      const number = told.do === "evaluate" ? told.asked.of : told.job;
      if (told.do === "predict") return;
      if (told.do === "planted") { planted(told.answer); return; }
      byId("after").hidden = false;
      byId("to-report").href = `/runs/${number}/report`;
      byId("to-zip").href = `/runs/${number}/run.zip`;
      byId("to-csv").href = `/runs/${number}/agreement.csv`;
      byId("trust").hidden = byId("planted").hidden = told.do === "evaluate";
      if (told.do === "evaluate") location.assign(`/runs/${number}/report#evaluation`);
      const seconds = told.answer.suite_seconds;
      if (seconds) byId("trust").textContent = `Test these explanations (quick suite, about ${seconds < 90 ? `${Math.ceil(seconds)} s` : `${Math.round(seconds / 60)} min`})`;
      verdicts(told.answer, number);
    });
    source.onerror = () => { if (source.readyState === EventSource.CLOSED) show("lost: reload the page"); };
    cancel.addEventListener("click", async () => { cancel.disabled = true; await call("DELETE", `/api/jobs/${state.job.job}`).catch(() => {}); });
    byId("planted").addEventListener("click", async () => {
      try { location.assign((await call("POST", "/api/planted", { by: state.job.asked.by })).page); }
      catch (error) { notes.append(made("li", error.message)); }
    });
    byId("trust").addEventListener("click", async () => {
      try { location.assign((await call("POST", `/api/jobs/${state.job.job}/evaluation`, {})).page); }
      catch (error) { notes.append(made("li", error.message)); }
    });
  }

  function planted(answer) {
    const card = made("section", "", { className: "card" }), worlds = Object.entries(answer.worlds), table = made("table", "", { className: "stack" });
    card.append(made("h2", "Does each method find what a network uses?"), made("p", "Drawn images, and networks whose evidence is known by construction: the share of a map that lies on it. The rows at the end look at nothing."));
    const head = made("tr");
    head.append(...["method", "mean", "95 %", ...worlds.map(([name]) => name)].map((name) => made("th", name, { scope: "col" })));
    table.append(made("thead"), made("tbody"));
    table.tHead.append(head);
    for (const row of answer.planted) {
      const line = made("tr");
      line.append(made("th", row.method, { scope: "row" }));
      for (const [label, text] of [["mean", Viewer.share(row.mean)], ["95 %", `${Viewer.share(row.low)} to ${Viewer.share(row.high)}`], ...worlds.map(([name]) => [name, Viewer.share(row[name])])]) {
        const cell = made("td", text);
        cell.dataset.label = label;
        line.append(cell);
      }
      table.tBodies[0].append(line);
    }
    const legend = made("dl", "", { className: "glossary" });
    for (const [name, what] of worlds) { const part = made("div"); part.append(made("dt", name), made("dd", what)); legend.append(part); }
    const scroll = made("div", "", { className: "scroll", tabIndex: 0 });
    scroll.append(table);
    card.append(scroll, legend);
    byId("verdicts").replaceChildren(card);
  }

  function verdicts(answer, number) {
    if (!answer.findings) return;
    const place = byId("verdicts"), card = made("section", "", { className: "card" });
    const rows = answer.findings.filter((one) => one.severity !== "note"), rest = answer.findings.length - rows.length;
    card.append(made("h2", "What to doubt"));
    if (!rows.length) card.append(made("p", "The audit has no error and no warning."));
    const kinds = Map.groupBy ? Map.groupBy(rows, (one) => one.code) : new Map(rows.map((one) => [one.code + one.where, [one]]));
    for (const [first, ...others] of kinds.values()) {
      const line = made("div", "", { className: "verdict-line" });
      line.append(made("p", `${first.severity}: ${first.message}. ${first.advice}`));
      if (others.length) {
        const more = made("details");
        more.append(made("summary", `${others.length} more of this kind`), ...others.map((one) => made("p", `${one.message}.`)));
        line.append(more);
      }
      card.append(line);
    }
    if (rest) card.append(made("p", `${rest} more in the report.`, { className: "soft" }));
    const links = made("p", "Panels for print: ", { className: "soft" });
    answer.samples.forEach((name, place_) => { for (const form of ["png", "svg", "pdf"]) links.append(made("a", `${name}.${form}`, { href: `/runs/${number}/panels/${place_}.${form}` }), " "); });
    card.append(links);
    place.replaceChildren(card);
  }

  // ---- ask: paint, and see the scores move

  function ask() {
    const paper = byId("paper"), context = paper.getContext("2d"), brush = byId("brush");
    let picture = null, mask = null, w = 0, h = 0, busy = false, again = false, patch = null;
    const value = (name) => brush.elements[name].value;

    async function load() {
      const frame = await call("GET", `/api/images/${state.image}/frame?model=${encodeURIComponent(value("model"))}`);
      w = frame.width; h = frame.height;
      paper.width = w; paper.height = h;
      mask = new Uint8Array(w * h);
      patch = [w / 2, h / 2];
      picture = new Image();
      picture.src = frame.image;
      await picture.decode();
      draw();
      send();
    }
    function draw() {
      context.drawImage(picture, 0, 0, w, h);
      const layer = new ImageData(w, h);
      for (let i = 0; i < mask.length; i++) if (mask[i]) { layer.data.set([0, 114, 178, 150], 4 * i); }
      const part = document.createElement("canvas");
      part.width = w; part.height = h;
      part.getContext("2d").putImageData(layer, 0, 0);
      context.drawImage(part, 0, 0);
      if (value("tool") === "patch" || document.activeElement === paper) {
        const size = Number(value("size"));
        context.strokeStyle = "#fff"; context.lineWidth = 1.5;
        context.strokeRect(patch[0] - size / 2, patch[1] - size / 2, size, size);
      }
    }
    function stamp(x, y) {
      const size = Number(value("size")), tool = value("tool"), on = tool === "erase" ? 0 : 1;
      patch = [x, y];
      if (tool === "patch") mask.fill(0);
      for (let row = Math.max(0, Math.floor(y - size / 2)); row < Math.min(h, y + size / 2); row++)
        for (let column = Math.max(0, Math.floor(x - size / 2)); column < Math.min(w, x + size / 2); column++)
          if (tool === "patch" || (column - x) ** 2 + (row - y) ** 2 <= size * size / 4) mask[row * w + column] = on;
      draw();
      send();
    }
    const packed = () => {
      const bytes = new Uint8Array(Math.ceil(mask.length / 8));
      for (let i = 0; i < mask.length; i++) if (mask[i]) bytes[i >> 3] |= 128 >> (i & 7);
      let text = "";
      for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
      return btoa(text);
    };
    async function send() {
      if (busy) { again = true; return; }
      busy = true;
      do {
        again = false;
        const begun = performance.now();
        try {
          const told = await call("POST", "/api/ask", { image: state.image, region: packed(), height: h, width: w, model: value("model"), mode: value("mode"), fill: value("fill") });
          show(told);
          paper.dataset.answered = Math.round(performance.now() - begun);
        } catch (error) { byId("share").textContent = error.message; }
      } while (again);
      busy = false;
    }
    function show(told) {
      const part = Viewer.percent(told.share);
      byId("share").textContent = told.share ? `${part} of the image is ${value("mode") === "remove" ? "taken away" : "kept"}` : value("mode") === "remove" ? "Nothing is taken away." : "Nothing is kept.";
      byId("scores").replaceChildren(...told.classes.map((one) => {
        const row = made("tr"), track = made("td", "", { className: "track" });
        row.append(made("th", one.name, { scope: "row" }), made("td", Viewer.percent(one.before), { className: "n" }), made("td", Viewer.percent(one.after), { className: "n" }), track);
        track.innerHTML = `<svg viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true"><rect x="0" y="0" width="${100 * one.before}" height="5" fill="currentColor" opacity=".35"/><rect x="0" y="6" width="${100 * one.after}" height="6" fill="#0072b2"/></svg>`;
        return row;
      }));
    }
    const at = (event) => {
      const box = paper.getBoundingClientRect();
      return [(event.clientX - box.left) / box.width * w, (event.clientY - box.top) / box.height * h];
    };
    paper.addEventListener("pointerdown", (event) => { if (!picture) return; paper.setPointerCapture(event.pointerId); stamp(...at(event)); });
    paper.addEventListener("pointermove", (event) => { if (picture && event.buttons) stamp(...at(event)); });
    paper.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (step) { patch = [patch[0] + 8 * step[0], patch[1] + 8 * step[1]]; if (value("tool") === "patch") stamp(...patch); else draw(); }
      else if (event.key === " ") stamp(...patch);
      else return;
      event.preventDefault();
    });
    brush.addEventListener("input", (event) => {
      if (event.target.name === "model") load();
      else if (["mode", "fill"].includes(event.target.name)) send();
      else draw();
    });
    byId("clear").addEventListener("click", () => { mask.fill(0); draw(); send(); byId("unit-list").replaceChildren(); });
    byId("find-units").addEventListener("click", async () => {
      const list = byId("unit-list");
      list.replaceChildren(made("li", "looking …"));
      try {
        const told = await call("POST", "/api/units", { image: state.image, region: packed(), height: h, width: w, model: value("model"), layer: byId("layer").value.trim() });
        byId("units-said").textContent = `Units of ${told.layer}; the number says by how many standard deviations of its map a unit is higher in the painted part.`;
        list.replaceChildren(...told.units.map((one) => {
          const item = made("li");
          item.append(made("img", "", { src: one.image, alt: `map of unit ${one.unit}` }), made("span", `unit ${one.unit}: +${one.contrast.toFixed(2)}`));
          return item;
        }));
      } catch (error) { list.replaceChildren(made("li", error.message)); }
    });
    byId("to-explain").href = `/?image=${encodeURIComponent(state.image)}`;
    load().catch((error) => { byId("share").textContent = error.message; });
  }

  // ---- a folder: accuracy, confusions, wrong ones first

  function folder() {
    const form = byId("looking");
    if (!form) return;
    let rows = [], chosen = null;
    const picked = new Set();
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      byId("said").textContent = "asked …";
      try {
        const job = await call("POST", "/api/predictions", { model: form.elements.model.value });
        const source = new EventSource(job.events);
        source.addEventListener("progress", (told) => bars(byId("bars"), JSON.parse(told.data).tasks));
        source.addEventListener("end", (told) => {
          source.close();
          bars(byId("bars"), []);
          const facts = JSON.parse(told.data);
          byId("said").textContent = facts.reason || "";
          if (facts.state === "done") { rows = facts.answer.rows; show(facts.answer); }
        });
      } catch (error) { byId("said").textContent = error.message; }
    });
    function show(answer) {
      byId("found").hidden = false;
      byId("accuracy").textContent = answer.known ? `${answer.right} of ${answer.known} images right (${Viewer.percent(answer.right / answer.known)})${answer.images > answer.known ? `; of ${answer.images - answer.known} more the class is not known` : ""}.` : `${answer.images} images; the true class of none is known, so the least sure come first.`;
      const counts = new Map();
      for (const row of rows) if (row.right === false) {
        const key = JSON.stringify([row.true, row.predicted]);
        counts.set(key, (counts.get(key) || 0) + 1);
      }
      byId("confusion").tBodies[0].replaceChildren(...[...counts].sort((x, y) => y[1] - x[1]).map(([key, count]) => {
        const [meant, called] = JSON.parse(key), row = made("tr"), head = made("th", "", { scope: "row" }), button = made("button", meant, { type: "button" });
        button.addEventListener("click", () => { chosen = chosen === key ? null : key; for (const one of row.parentElement.rows) one.classList.toggle("chosen-row", one === row && chosen !== null); list(); });
        head.append(button);
        row.append(head, made("td", called), made("td", count, { className: "n" }));
        return row;
      }));
      byId("confusion").hidden = !counts.size;
      list();
    }
    function list() {
      const known = rows.some((row) => row.right !== null && row.right !== undefined);
      const fits = rows.filter((row) => row.predicted && (chosen ? JSON.stringify([row.true, row.predicted]) === chosen : !known || row.right === false));
      fits.sort((x, y) => known ? y.probability - x.probability : x.probability - y.probability);
      byId("shown-heading").textContent = chosen ? `${JSON.parse(chosen).join(", called ")}: ${fits.length}` : known ? "Wrong, surest first" : "Least sure first";
      byId("rows").tBodies[0].replaceChildren(...fits.slice(0, 500).map((row) => {
        const line = made("tr"), cell = made("td"), box = made("input", "", { type: "checkbox", checked: picked.has(row.place) });
        box.setAttribute("aria-label", `pick ${row.name}`);
        box.addEventListener("change", () => { if (box.checked) picked.add(row.place); else picked.delete(row.place); byId("explain-picked").disabled = !picked.size; });
        cell.append(box);
        const head = named("th", row.name, { scope: "row" });
        if (row.small) head.prepend(made("img", "", { src: row.small, alt: "", className: "thumb", loading: "lazy" }));
        line.append(cell, head, made("td", row.true || "\u2013"), made("td", row.predicted), made("td", Viewer.share(row.probability), { className: "n" }));
        return line;
      }));
    }
    byId("explain-picked").addEventListener("click", async () => {
      try {
        const found = await call("POST", "/api/folder-images", { places: [...picked].slice(0, 64) });
        location.assign("/?" + found.images.map((one) => `image=${encodeURIComponent(one.image)}`).join("&"));
      } catch (error) { byId("said").textContent = error.message; }
    });
  }

  ({ home, job, ask, folder })[document.body.dataset.page]?.();
})();
