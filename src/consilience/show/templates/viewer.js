// Maps that can be cut, laid over each other and read. A tile brings its map as 65,536
// levels (see show/levels.py); its drawing stands until the map is unpacked.
const Viewer = (() => {
  "use strict";
  const TOP = 65535, SHADES = 256;
  const A = [0, 114, 178], B = [230, 159, 0], BOTH = [255, 255, 255];
  const article = new WeakMap();
  let ramps = null;

  const bytesOf = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const floats = (text) => new Float32Array(bytesOf(text).buffer);
  async function inflate(text) {
    const stream = new Blob([bytesOf(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }
  async function levelsOf(text) {
    const halves = await inflate(text), size = halves.length / 2, levels = new Uint16Array(size);
    for (let i = 0, level = 0; i < size; i++) {
      level = (level + (halves[i] << 8 | halves[size + i])) & TOP;
      levels[i] = level;
    }
    return levels;
  }

  let stopsOf = null;
  function ramp(signed) {
    if (!ramps) {
      ramps = stopsOf || JSON.parse(document.getElementById("ramps").textContent);
      for (const name of ["plain", "signed"]) {
        const stops = ramps[name].map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
        ramps[name] = Array.from({ length: SHADES }, (_, i) => {
          const at = i / (SHADES - 1) * (stops.length - 1), low = Math.floor(at), high = Math.min(low + 1, stops.length - 1);
          return stops[low].map((channel, k) => channel + (stops[high][k] - channel) * (at - low));
        });
      }
    }
    return ramps[signed ? "signed" : "plain"];
  }

  // ---- maps

  async function unpack(data) {
    const map = { ...data, knots: floats(data.knots), levels: await levelsOf(data.levels) };
    map.size = map.levels.length;
    // how many pixels have this level or a higher one
    const above = new Uint32Array(TOP + 2);
    for (let i = 0; i < map.size; i++) above[map.levels[i]]++;
    for (let level = TOP - 1; level >= 0; level--) above[level] += above[level + 1];
    map.above = above;
    if (data.mask) {
      const bits = await inflate(data.mask);
      map.on = Uint8Array.from({ length: map.size }, (_, i) => bits[i >> 3] >> (7 - (i & 7)) & 1);
    }
    if (data.superpixels) {
      const { segments, weights, stderr, marks } = data.superpixels;
      map.superpixels = {
        segments: await levelsOf(segments), weights: floats(weights),
        stderr: stderr ? floats(stderr) : null, marks: await inflate(marks),
      };
      const areas = new Uint32Array(map.superpixels.weights.length);
      for (const segment of map.superpixels.segments) areas[segment]++;
      map.superpixels.areas = areas;
      map.superpixels.order = [...areas.keys()].sort((x, y) => map.superpixels.weights[y] - map.superpixels.weights[x] || x - y);
    }
    const shades = ramp(map.signed);
    map.colours = new Uint8ClampedArray(SHADES * 3);
    map.strength = new Float32Array(SHADES);
    for (let i = 0; i < SHADES; i++) {
      const value = (map.knots[i] + map.knots[i + 1]) / 2;
      const share = map.flat ? 0.5 : Math.min(1, Math.max(0, (value - map.low) / (map.high - map.low)));
      map.colours.set(shades[Math.round(share * (SHADES - 1))], 3 * i);
      map.strength[i] = map.flat ? 0 : map.signed ? Math.abs(2 * share - 1) : share;
    }
    return map;
  }

  function valueOf(map, level) {
    const at = level / TOP * (map.knots.length - 1), low = Math.min(Math.floor(at), map.knots.length - 2);
    return map.knots[low] + (map.knots[low + 1] - map.knots[low]) * (at - low);
  }

  // ---- masks

  // The `area` highest pixels; what is tied at the cut is left out, as the program does.
  function highest(map, area) {
    let low = 0, high = TOP + 1;  // the highest level that still has `area` pixels
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (map.above[middle] >= area) low = middle; else high = middle;
    }
    return from(map, map.above[low] === area ? low : low + 1);
  }

  function from(map, cut) {
    const { levels, size } = map, on = new Uint8Array(size);
    for (let i = 0; i < size; i++) on[i] = levels[i] >= cut ? 1 : 0;
    return { on, area: cut > TOP ? 0 : map.above[cut] };
  }

  // Whole superpixels, greatest weight first, until `least` pixels are covered.
  function wholeSuperpixels(map, least) {
    const { order, areas } = map.superpixels, taken = [];
    let area = 0;
    for (const segment of order) {
      if (area >= least) break;
      taken.push(segment);
      area += areas[segment];
    }
    return { on: painted(map, taken), area };
  }

  function painted(map, taken) {
    const { segments, weights } = map.superpixels, on = new Uint8Array(map.size), among = new Uint8Array(weights.length);
    for (const segment of taken) among[segment] = 1;
    for (let i = 0; i < map.size; i++) on[i] = among[segments[i]];
    return on;
  }

  // Whole superpixels up to `area`, and of the next its first pixels in reading order.
  function filled(map, area) {
    const { order, areas, segments } = map.superpixels, taken = [];
    let sum = 0, next = -1;
    for (const segment of order) {
      if (sum + areas[segment] > area) { next = segment; break; }
      taken.push(segment);
      sum += areas[segment];
    }
    const on = painted(map, taken);
    for (let i = 0, left = area - sum; i < map.size && left > 0; i++) if (segments[i] === next) { on[i] = 1; left--; }
    return { on, area };
  }

  const pixels = (share, size) => Math.floor(share * size + 0.5);

  function maskOf(map, cut, at) {
    if (cut === "run") {
      if (!map.on) return null;
      map.runs ??= { on: map.on, area: map.on.reduce((sum, one) => sum + one, 0) };
      return map.runs;
    }
    if (map.flat) return { on: new Uint8Array(map.size), area: 0 };
    if (cut === "area") {
      const area = pixels(at, map.size);
      return map.superpixels ? wholeSuperpixels(map, area) : highest(map, area);
    }
    const largest = valueOf(map, TOP), least = at * largest;
    if (largest <= 0) return { on: new Uint8Array(map.size), area: 0 };
    let low = -1, high = TOP;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (valueOf(map, middle) >= least) high = middle; else low = middle;
    }
    return from(map, high);
  }

  // Two masks; of the same area where that is asked for, which a superpixel map sets.
  function maskPair(a, b, cut, at) {
    if (cut !== "area" || !(a.superpixels || b.superpixels) || a.flat || b.flat) return [maskOf(a, cut, at), maskOf(b, cut, at)];
    const first = a.superpixels ? a : b, second = first === a ? b : a;
    const set = wholeSuperpixels(first, pixels(at, first.size));
    const other = second.superpixels ? filled(second, set.area) : highest(second, set.area);
    return first === a ? [set, other] : [other, set];
  }

  // E[X / (a + b - X)], X hypergeometric: the IoU of masks of these areas thrown at random.
  function chance(size, a, b) {
    if (!a && !b) return NaN;
    const least = Math.max(0, a + b - size), most = Math.min(a, b);
    const mode = Math.min(most, Math.max(least, Math.floor((a + 1) * (b + 1) / (size + 2))));
    const step = (x) => (a - x) * (b - x) / ((x + 1) * (size - a - b + x + 1));
    let weights = 1, sum = mode / (a + b - mode);
    for (let x = mode, weight = 1; x < most && weight > 1e-14; x++) {
      weight *= step(x);
      weights += weight; sum += weight * (x + 1) / (a + b - x - 1);
    }
    for (let x = mode, weight = 1; x > least && weight > 1e-14; x--) {
      weight /= step(x - 1);
      weights += weight; sum += weight * (x - 1) / (a + b - x + 1);
    }
    return sum / weights;
  }

  function overlap(a, b, cut, at) {
    if (a.h !== b.h || a.w !== b.w) return { why: "frames of different size" };
    const [one, two] = maskPair(a, b, cut, at);
    if (!one || !two) return { why: "no mask was cut in the run" };
    let shared = 0;
    for (let i = 0; i < a.size; i++) shared += one.on[i] & two.on[i];
    const union = one.area + two.area - shared, expected = chance(a.size, one.area, two.area);
    const iou = union ? shared / union : NaN;
    return { one, two, shared, iou, expected, excess: expected < 1 ? (iou - expected) / (1 - expected) : NaN, why: union ? "" : "both masks are empty" };
  }

  // ---- drawing

  const spare = document.createElement("canvas");
  function lay(context, image, w, h) {
    if (spare.width !== w || spare.height !== h) { spare.width = w; spare.height = h; }
    spare.getContext("2d").putImageData(image, 0, 0);  // all of it is replaced
    context.drawImage(spare, 0, 0, w, h);
  }

  function put(data, i, colour, alpha) {  // over what is there
    const k = 4 * i, under = data[k + 3] / 255, all = alpha + under * (1 - alpha);
    if (!all) return;
    for (let c = 0; c < 3; c++) data[k + c] = (colour[c] * alpha + data[k + c] * under * (1 - alpha)) / all;
    data[k + 3] = 255 * all;
  }

  const WHITE = [255, 255, 255], BLACK = [0, 0, 0];
  function outline(data, on, w, h) {
    for (let y = 0, i = 0; y < h; y++) for (let x = 0; x < w; x++, i++) {
      const own = on[i];
      const edge = x > 0 && on[i - 1] !== own || x < w - 1 && on[i + 1] !== own || y > 0 && on[i - w] !== own || y < h - 1 && on[i + w] !== own;
      if (edge) put(data, i, own ? BLACK : WHITE, own ? 0.75 : 1);
    }
  }

  // The colours of a map over its image, which are kept while only the cut moves.
  function painting(map, base, opacity) {
    if (map.painting && map.painted === opacity) return map.painting;
    const { w, h } = map, image = new ImageData(w, h), data = image.data;
    if (opacity && !map.flat) {
      for (let i = 0, k = 0; i < map.size; i++, k += 4) {
        const shade = map.levels[i] >> 8;
        data[k] = map.colours[3 * shade]; data[k + 1] = map.colours[3 * shade + 1]; data[k + 2] = map.colours[3 * shade + 2];
        data[k + 3] = 255 * opacity * map.strength[shade];
      }
      if (map.superpixels) {
        const marks = map.superpixels.marks;
        for (let i = 0; i < map.size; i++) if (marks[i]) put(data, i, marks[i] === 3 ? BLACK : WHITE, marks[i] === 1 ? 0.55 : 1);
      }
    }
    map.painting ??= Object.assign(document.createElement("canvas"), { width: w, height: h });
    const context = map.painting.getContext("2d");
    context.drawImage(base, 0, 0, w, h);
    lay(context, image, w, h);
    map.painted = opacity;
    return map.painting;
  }

  function paintMap(context, map, base, how) {
    const { w, h } = map;
    context.drawImage(painting(map, base, how.map ? how.opacity : 0), 0, 0);
    const mask = how.mask || how.outline ? maskOf(map, how.cut, how.at) : null;
    if (!mask) return null;
    const image = new ImageData(w, h), data = image.data, on = mask.on;
    if (how.mask) for (let i = 0, k = 3; i < map.size; i++, k += 4) if (!on[i]) data[k] = 168;
    if (how.outline) outline(data, on, w, h);
    lay(context, image, w, h);
    return mask;
  }

  function paintPair(context, a, b, base, how) {
    const found = overlap(a, b, how.cut, how.at), { w, h } = a;
    context.drawImage(base, 0, 0, w, h);
    if (found.one) {
      const image = new ImageData(w, h), data = image.data;
      for (let i = 0, k = 0; i < a.size; i++, k += 4) {
        const kind = found.one.on[i] + 2 * found.two.on[i];
        const colour = kind === 3 ? BOTH : kind === 2 ? B : kind === 1 ? A : BLACK;
        data[k] = colour[0]; data[k + 1] = colour[1]; data[k + 2] = colour[2];
        data[k + 3] = kind ? 158 : 168;
      }
      lay(context, image, w, h);
    }
    return found;
  }

  // ---- words

  const short = (value, digits = 3) => Number.isFinite(value) ? String(Number(value.toPrecision(digits))).replace("-", "\u2212") : "\u2013";
  const share = (value) => Number.isFinite(value) ? value.toFixed(3).replace("-", "\u2212") : "\u2013";
  const percent = (value) => !Number.isFinite(value) ? "\u2013" : `${value >= 0.9995 ? "100" : value < 0.0001 ? Number((100 * value).toPrecision(3)) : (100 * value).toPrecision(3)}\u00a0%`;

  function read(map, x, y) {
    const i = y * map.w + x, level = map.levels[i], least = map.above[level];
    let text = `${short(valueOf(map, level))} at row ${y + 1}, column ${x + 1}; ${percent(least / map.size)} of the map is as high or higher`;
    if (map.superpixels) {
      const { segments, weights, stderr } = map.superpixels, segment = segments[i], weight = weights[segment];
      text = `superpixel ${segment}: weight ${short(weight)}`;
      if (stderr && Number.isFinite(stderr[segment])) text += `, 95\u00a0% interval ${short(weight - 1.96 * stderr[segment])} to ${short(weight + 1.96 * stderr[segment])}`;
    }
    return text;
  }

  function placeIn(canvas, event, map) {
    const box = canvas.getBoundingClientRect();
    const at = (part, whole, count) => Math.min(count - 1, Math.max(0, Math.floor(part / whole * count)));
    return [at(event.clientX - box.left, box.width, map.w), at(event.clientY - box.top, box.height, map.h)];
  }

  // ---- an image with its maps

  function tilesOf(element) {
    return [...element.querySelectorAll("li.tile.map")];
  }

  // An image's maps, unpacked once each however often it is asked; tiles that come later are found later.
  async function open(element) {
    let known = article.get(element);
    if (!known) article.set(element, known = { maps: new Map(), canvases: new Map(), opening: new Map() });
    for (const tile of tilesOf(element)) if (!known.opening.has(tile)) known.opening.set(tile, openTile(element, tile, known));
    await Promise.all(known.opening.values());
    known.base = element.querySelector("li.tile:not(.map) .stage img");
    if (!known.base.complete || !known.base.naturalWidth) { known.base.loading = "eager"; await known.base.decode().catch(() => {}); }
    return known;
  }

  async function openTile(element, tile, known) {
    const column = Number(tile.dataset.column);
    const map = await unpack(JSON.parse(tile.querySelector("script").textContent));
    map.name = tile.querySelector("h4").textContent;
    known.maps.set(column, map);
    dress(element, tile, map, known);
  }

  function dress(element, tile, map, known) {
    const stage = tile.querySelector(".stage"), image = stage.querySelector("img");
    const canvas = document.createElement("canvas"), button = document.createElement("button");
    canvas.width = map.w; canvas.height = map.h;
    button.type = "button";
    button.setAttribute("aria-label", `${image.alt}; enlarge`);
    button.append(canvas);
    button.addEventListener("click", () => enlarge(element, Number(tile.dataset.column)));
    known.canvases.set(Number(tile.dataset.column), canvas);
    canvas.swap = () => { if (!button.isConnected) stage.replaceChildren(button); };  // once it is drawn
    const value = document.createElement("p");
    value.className = "value";
    tile.querySelector(".foot").append(value);
    canvas.addEventListener("pointermove", (event) => { value.textContent = read(map, ...placeIn(canvas, event, map)); });
    canvas.addEventListener("pointerleave", () => { value.textContent = ""; });
  }

  function pairTile(element, known) {
    if (known.pair) return known.pair;
    const tile = document.createElement("li");
    tile.className = "tile live-pair";
    tile.innerHTML = '<h4></h4><div class="stage"><canvas role="img"></canvas></div><div class="foot"><div class="numbers-line"></div><ul class="key"></ul></div>';
    element.querySelector(".tiles").append(tile);
    for (const drawn of element.querySelectorAll(".drawn-pair")) drawn.hidden = true;
    return known.pair = tile;
  }

  function key(list, names) {
    const colours = [A, B, BOTH];
    list.replaceChildren(...names.map((name, i) => {
      const line = document.createElement("li");
      line.innerHTML = `<svg aria-hidden="true" viewBox="0 0 12 12"><rect x=".5" y=".5" width="11" height="11" rx="2" fill="rgb(${colours[i]})" stroke="#8a939d"/></svg>`;
      line.append(name);
      return line;
    }));
  }

  // Draws an image's maps as asked; answers with the overlap of A and B, where there are two.
  async function paint(element, how) {
    const known = await open(element);
    if (!known.base || !known.base.naturalWidth) return null;
    for (const [column, canvas] of known.canvases) {
      const mask = paintMap(canvas.getContext("2d"), known.maps.get(column), known.base, how);
      canvas.swap();
      canvas.title = mask ? `mask: ${percent(mask.area / known.maps.get(column).size)} of the frame` : "";
    }
    const a = known.maps.get(how.a), b = known.maps.get(how.b);
    if (!a || !b || a === b) { if (known.pair) known.pair.hidden = true; return null; }
    const tile = pairTile(element, known), canvas = tile.querySelector("canvas");
    tile.hidden = false;
    if (a.h !== b.h || a.w !== b.w) { tile.querySelector(".numbers-line").textContent = "frames of different size"; return null; }
    if (canvas.width !== a.w || canvas.height !== a.h) { canvas.width = a.w; canvas.height = a.h; }
    const found = paintPair(canvas.getContext("2d"), a, b, known.base, how);
    tile.querySelector("h4").textContent = `${a.name} & ${b.name}`;
    const line = tile.querySelector(".numbers-line");
    line.innerHTML = "";
    if (found.why) line.textContent = found.why;
    else {
      const strong = document.createElement("b");
      strong.textContent = `IoU ${share(found.iou)}`;
      line.append(strong, ` \u00b7 chance ${share(found.expected)} \u00b7 excess ${share(found.excess)}`);
    }
    canvas.setAttribute("aria-label", `masks of ${a.name} and ${b.name} over each other: ${line.textContent}`);
    key(tile.querySelector(".key"), found.one ? [`${a.name} only`, `${b.name} only`, `both: ${percent(found.shared / a.size)} of the frame`] : []);
    return found;
  }

  // ---- large, and two against each other

  let shownLarge = null;
  function enlarge(element, column) {
    const dialog = document.getElementById("large"), known = article.get(element);
    if (!dialog) return;
    const heading = element.querySelector("h3");
    dialog.querySelector("h2").textContent = heading ? heading.textContent : known.maps.get(column).name;
    for (const select of dialog.querySelectorAll("select")) {
      select.replaceChildren(...[...known.maps].sort(([x], [y]) => x - y).map(([number, map]) => new Option(map.name, number)));
      select.value = column;
    }
    const other = [...known.maps.keys()].sort((x, y) => x - y).find((number) => number !== column);
    if (other !== undefined) dialog.querySelector("[name=right]").value = other;
    dialog.querySelector(".swipe").hidden = known.maps.size < 2;
    dialog.querySelector("[name=meet]").value = 100;
    shownLarge = { element, known, at: null };
    dialog.showModal();
    drawLarge();
  }

  function drawLarge() {
    const dialog = document.getElementById("large"), canvas = dialog.querySelector("canvas");
    const pick = (name) => shownLarge.known.maps.get(Number(dialog.querySelector(`[name=${name}]`).value));
    const left = pick("left"), right = pick("right") || left, how = Viewer.how;
    const scale = Math.max(1, Math.ceil(640 / Math.max(left.w, left.h)));
    canvas.width = left.w * scale; canvas.height = left.h * scale;
    const context = canvas.getContext("2d"), flickers = dialog.querySelector("[name=flicker]").checked;
    const meet = flickers ? Number(shownLarge.second = !shownLarge.second) : Number(dialog.querySelector("[name=meet]").value) / 100;
    clearTimeout(shownLarge.again);
    if (flickers) shownLarge.again = setTimeout(() => { if (dialog.open) drawLarge(); }, 600);
    const part = document.createElement("canvas");
    const draw = (map, from, to) => {
      if (to <= from) return;
      part.width = map.w; part.height = map.h;
      paintMap(part.getContext("2d"), map, shownLarge.known.base, how);
      context.save();
      context.beginPath();
      context.rect(from * canvas.width, 0, (to - from) * canvas.width, canvas.height);
      context.clip();
      context.drawImage(part, 0, 0, canvas.width, canvas.height);
      context.restore();
    };
    draw(left, 0, meet);
    draw(right, meet, 1);
    if (meet > 0 && meet < 1) { context.fillStyle = "#fff"; context.fillRect(meet * canvas.width - 1, 0, 3, canvas.height); }
    shownLarge.maps = [left, right, meet];
  }

  function readLarge(x, y) {
    const [left, right, meet] = shownLarge.maps, map = x / left.w < meet ? left : right;
    shownLarge.at = [x, y];
    document.getElementById("large-value").textContent = `${map.name}: ${read(map, x, y)}`;
  }

  function wireLarge() {
    const dialog = document.getElementById("large");
    if (!dialog) return;
    const canvas = dialog.querySelector("canvas");
    dialog.addEventListener("input", drawLarge);
    dialog.addEventListener("close", () => { clearTimeout(shownLarge.again); dialog.querySelector("[name=flicker]").checked = false; });
    canvas.addEventListener("pointermove", (event) => readLarge(...placeIn(canvas, event, shownLarge.maps[0])));
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      const map = shownLarge.maps[0], far = event.shiftKey ? 10 : 1;
      const [x, y] = shownLarge.at || [map.w >> 1, map.h >> 1];
      const inside = (value, count) => Math.min(count - 1, Math.max(0, value));
      readLarge(inside(x + far * step[0], map.w), inside(y + far * step[1], map.h));
      if (!dialog.querySelector("[name=flicker]").checked) drawLarge();
      const scale = canvas.width / map.w, context = canvas.getContext("2d");
      context.strokeStyle = "#fff"; context.lineWidth = 2;
      context.strokeRect((shownLarge.at[0] - 2) * scale, (shownLarge.at[1] - 2) * scale, 5 * scale, 5 * scale);
    });
  }

  return { ramps(stops) { stopsOf = stops; }, open, paint, unpack, overlap, maskOf, chance, read, wireLarge, share, percent, short, article, how: { map: true, mask: false, outline: true, opacity: 0.75, cut: "run", at: 0.2, a: 0, b: 1 } };
})();
