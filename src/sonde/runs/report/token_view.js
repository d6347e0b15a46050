
{ // Token views: a passage coloured by a statistic, layers by tokens as a heat map, and every layer's top predictions.
  const CELL = 14;
  const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];
  const TWO_SIDED = ["#0b4a8f", "#61a3e5", "#f3f0ec", "#d48b4c", "#8a4300"];
  const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  const ramp = (stops, share) => {
    const at = Math.min(Math.max(share, 0), 1) * (stops.length - 1), i = Math.min(Math.floor(at), stops.length - 2), f = at - i;
    const [a, b] = [channels(stops[i]), channels(stops[i + 1])];
    return a.map((value, c) => value + f * (b[c] - value));
  };
  const percent = (p) => (p >= 0.0995 ? (100 * p).toFixed(0) : p >= 0.00995 ? (100 * p).toFixed(1) : p >= 0.001 ? (100 * p).toFixed(2) : "<0.1") + "%";
  const figures = (value, whole) => { // three significant digits; counts as they are
    if (Number.isNaN(value)) return "–";
    const text = whole || Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : value === 0 ? "0" : value.toPrecision(3);
    return text.replace("-", "−");
  };
  const short = (value) => String(Number(value.toPrecision(3))).replace("-", "−");

  const unpack = (head, buffer) => {
    const bytes = new Uint8Array(buffer), { T, L, K } = head;
    let at = 0;
    const take = (count, width) => {
      const values = width === 4 ? new Uint32Array(count) : width === 2 ? new Uint16Array(count) : new Uint8Array(count);
      for (let plane = 0; plane < width; plane++, at += count)
        for (let i = 0; i < count; i++) values[i] += bytes[at + i] * 2 ** (8 * plane);
      return values;
    };
    const wide = head.wide ? 4 : 2;
    return {
      tokens: take(T, wide), top: take(L * T * K, wide), log2p: take(L * T * K, 2), hits: take(L * T, 1),
      stats: head.stats.map((stat) => take(stat.layered ? L * T : T, 2)), ranks: head.ranked ? take(L * T, 2) : null,
      none: head.wide ? 0xffffffff : 0xffff,
    };
  };

  const build = (root, head, data) => {
    const { T, L, K, sites, stats } = head, id = root.dataset.id;
    const passage = $(".passage", root), spans = $$("span", passage), live = $("[aria-live]", root), legend = $(".legend", root);
    let [token, layer] = head.start, stat = 0, pinned = false, shownToken = token, shownLayer = layer, spoken;
    const value = (s, l, t) => {
      const { scale, step, layered } = stats[s], coded = data.stats[s][layered ? l * T + t : t];
      return coded === 0xffff ? NaN : step * (scale === "diverging" ? coded - 32767 : coded);
    };
    const share = (s, v) => (stats[s].scale === "diverging" ? (v / stats[s].max + 1) / 2 : v / stats[s].max);
    const step = (s, v) => {
      if (Number.isNaN(v)) return "gap";
      const n = stats[s].scale === "diverging" ? 9 : 7;
      return stats[s].scale[0] + Math.min(n - 1, Math.max(0, Math.floor(share(s, v) * n)));
    };
    const spokenName = (index) => head.names[index] ?? head.vocab[index];
    const layerName = (l) => (/^\d+$/.test(sites[l]) ? `Layer ${sites[l]}` : sites[l]);
    const unit = (s) => (stats[s].unit ? ` ${stats[s].unit}` : "");

    // Controls
    const choose = make("select", {}, ...stats.map((one, i) => make("option", { value: i }, one.name)));
    const slider = make("input", { type: "range", min: 0, max: L - 1, step: 1, value: layer });
    const output = make("output");
    const controls = $(".controls", root);
    controls.append(make("label", {}, "Colour", choose));
    if (L > 1) controls.append(make("label", {}, "Layer", slider, output));
    controls.hidden = stats.length < 2 && L < 2;

    // Passage as one tab stop
    passage.setAttribute("role", "listbox");
    spans.forEach((span, t) => { span.id = `tv-${id}-t${t}`; span.setAttribute("role", "option"); span.setAttribute("aria-selected", "false"); });

    // Overview strip and heat map
    const rest = $(".rest", root);
    const strip = make("canvas", { width: T, height: 1, "aria-hidden": "true" }), stripMark = make("i");
    const map = make("canvas", { width: T, height: L, role: "img", style: `width:${T * CELL}px;height:${L * CELL}px` }), mark = make("i");
    const rows = make("div", { class: "rows", "aria-hidden": "true" });
    const every = L > 26 ? Math.ceil(L / 26) : 1;
    const names = sites.map((site, l) => make("div", {}, l % every === (L - 1) % every ? site : "\u00a0")).reverse();
    rows.append(...names);
    const scroller = make("div", { class: "map", tabindex: "0", role: "region", "aria-label": "Heat map of layers by tokens" }, map, mark);
    const heatLow = make("span"), heatHigh = make("span"), heatRamp = make("span", { class: "ramp", "aria-hidden": "true" });
    const heat = make("div", { class: "heat" }, rows, scroller);
    const heatNote = make("p", { class: "heatnote" }, make("span", {}, "Each column is a token, each row a layer:"), heatLow, heatRamp, heatHigh);
    const printed = make("div", { class: "printed" });
    rest.append(make("div", { class: "strip" }, strip, stripMark));
    if (L > 1) rest.append(heat, heatNote);
    rest.append(printed);

    // Panel
    const caption = make("caption");
    const heads = ["layer", "", ...(data.ranks ? ["rank"] : []), ...Array.from({ length: K }, (_, k) => (k ? `${k + 1}` : "top 1"))];
    const headCells = heads.map((text, i) => make("th", { scope: "col", class: i === 1 || (data.ranks && i === 2) ? "num" : false }, text));
    const body = make("tbody");
    const lines = Array.from({ length: L }, (_, l) => {
      const cells = heads.slice(1).map((_, i) => make("td", { class: i === 0 || (data.ranks && i === 1) ? "num" : false }));
      const row = make("tr", {}, make("th", { scope: "row" }, sites[l]), ...cells);
      row.addEventListener("click", () => pin(token, l));
      return { row, cells };
    });
    body.append(...lines.map((line) => line.row).reverse());
    const panel = make("div", { class: "panel" }, make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `${root.querySelector("h3").firstChild.textContent.trim()}: predictions` },
      make("table", {}, caption, make("thead", {}, make("tr", {}, ...headCells)), body)));
    rest.append(panel, make("p", { class: "keys" }, `Point at a token or tap it. Keys in the passage: ← → token, Page Up and Down 20 tokens${L > 1 ? ", ↑ ↓ layer" : ""}, Enter keeps it, Esc lets go.${K ? " Bold and underlined: the token that followed; rank: its place in the prediction." : ""}`));

    const paint = (canvas, from, to, top) => {
      const pixels = new ImageData(to - from, top.length), stops = stats[stat].scale === "diverging" ? TWO_SIDED : CIVIDIS;
      top.forEach((l, y) => {
        for (let t = from; t < to; t++) {
          const v = value(stat, l, t), at = 4 * (y * (to - from) + t - from);
          if (Number.isNaN(v)) continue; // a gap stays transparent
          pixels.data.set([...ramp(stops, share(stat, v)), 255], at);
        }
      });
      canvas.getContext("2d").putImageData(pixels, 0, 0);
    };
    const deepFirst = Array.from({ length: L }, (_, i) => L - 1 - i);
    const recolour = () => spans.forEach((span, t) => {
      const kept = (span.classList.contains("on") ? " on" : "") + (span.classList.contains("near") ? " near" : "");
      span.className = step(stat, value(stat, shownLayer, t)) + kept;
    });
    const restat = () => {
      const { name, scale, max, layered, beyond } = stats[stat], two = scale === "diverging", count = two ? 9 : 7;
      const low = two ? `−${short(max)}` : "0", high = `${short(max)}${unit(stat)}${beyond ? " or more" : ""}`;
      $(".of", legend).textContent = name; $(".low", legend).textContent = low; $(".high", legend).textContent = high;
      $(".steps", legend).replaceChildren(...Array.from({ length: count }, (_, i) => make("i", { class: scale[0] + i })));
      heatLow.textContent = low; heatHigh.textContent = high;
      heatRamp.style.background = `linear-gradient(90deg,${(two ? TWO_SIDED : CIVIDIS).join(",")})`;
      headCells[1].textContent = name + (stats[stat].unit ? `, ${stats[stat].unit}` : "");
      heat.hidden = heatNote.hidden = !layered;
      map.setAttribute("aria-label", `Heat map of ${name}, ${L} layers by ${T} tokens; the table below has the values of the chosen token`);
      if (layered) paint(map, 0, T, deepFirst);
      restrip(); recolour(); table();
    };
    const restrip = () => paint(strip, 0, T, [shownLayer]);
    const table = () => {
      caption.textContent = `Token ${shownToken + 1} of ${T}: ${quoted(data.tokens[shownToken])}`;
      for (let l = 0; l < L; l++) {
        const { row, cells } = lines[l], at = l * T + shownToken;
        row.classList.toggle("at", l === shownLayer);
        cells[0].textContent = figures(value(stat, l, shownToken), stats[stat].step === 1);
        if (data.ranks) cells[1].textContent = data.ranks[at] ? (data.ranks[at] === 0xffff ? "≥ 65,535" : data.ranks[at].toLocaleString("en")) : "–";
        for (let k = 0; k < K; k++) {
          const cell = cells[1 + !!data.ranks + k], index = data.top[at * K + k];
          cell.className = data.hits[at] === k + 1 ? "true" : "";
          if (index === data.none) { cell.textContent = "–"; continue; }
          const code = make("code", {}, head.vocab[index]), name = head.names[index];
          if (name) { code.setAttribute("role", "img"); code.setAttribute("aria-label", name); }
          cell.replaceChildren(code, make("small", {}, percent(2 ** (-data.log2p[at * K + k] / 2048))));
        }
      }
    };
    const quoted = (index) => (head.names[index] ? head.names[index] : `“${head.vocab[index]}”`);
    const say = () => {
      clearTimeout(spoken);
      spoken = setTimeout(() => {
        const at = shownLayer * T + shownToken, v = value(stat, shownLayer, shownToken), first = K ? data.top[at * K] : data.none;
        const parts = [`Token ${shownToken + 1}, ${spokenName(data.tokens[shownToken])}. ${layerName(shownLayer)}: ${Number.isNaN(v) ? "no value" : figures(v, stats[stat].step === 1) + unit(stat)}.`];
        if (first !== data.none) parts.push(`Top: ${spokenName(first)} ${percent(2 ** (-data.log2p[at * K] / 2048)).replace("%", " percent").replace("<", "under ")}.`);
        if (data.ranks && data.ranks[at]) parts.push(`True token has rank ${data.ranks[at]}.`);
        live.textContent = parts.join(" ");
      }, 150);
    };
    const show = (t, l) => { // what the panel and the marks stand on; the pinned token keeps its frame
      const moved = l !== shownLayer;
      spans[shownToken]?.classList.remove("near");
      [shownToken, shownLayer] = [t, l];
      if (t !== token) spans[t].classList.add("near");
      if (moved) { recolour(); restrip(); slider.value = l; }
      names.forEach((name, i) => { name.style.fontWeight = L - 1 - i === l ? 700 : 400; });
      output.textContent = sites[l];
      stripMark.style.left = `${(100 * (t + 0.5)) / T}%`;
      mark.style.left = `${t * CELL}px`; mark.style.top = `${(L - 1 - l) * CELL}px`;
      table();
    };
    const centre = () => {
      const span = spans[token], box = passage.getBoundingClientRect(), place = span.getBoundingClientRect();
      if (place.top < box.top + 20 || place.bottom > box.bottom - 20)
        passage.scrollTop += place.top - box.top - box.height / 2;
      scroller.scrollLeft = (token + 0.5) * CELL - scroller.clientWidth / 2;
    };
    const select = (t, l) => {
      const before = spans[token];
      before.classList.remove("on"); before.setAttribute("aria-selected", "false");
      token = Math.min(Math.max(t, 0), T - 1); layer = Math.min(Math.max(l, 0), L - 1);
      spans[token].classList.add("on"); spans[token].setAttribute("aria-selected", "true");
      passage.setAttribute("aria-activedescendant", spans[token].id);
      show(token, layer);
    };
    const link = () => history.replaceState(null, "", `#tv=${encodeURIComponent(id)},t${token},l${layer},${stats[stat].key}`);
    const pin = (t, l) => { pinned = true; select(t, l); link(); say(); };

    const tokenAt = (event) => { const span = event.target.closest(".passage span"); return span ? spans.indexOf(span) : -1; };
    const cellAt = (event) => [Math.min(T - 1, Math.floor(event.offsetX / CELL)), Math.max(0, L - 1 - Math.floor(event.offsetY / CELL))];
    const hover = (event, t, l) => { if (event.pointerType === "mouse" && t >= 0 && (t !== shownToken || l !== shownLayer)) show(t, l); };
    const leave = () => { if (shownToken !== token || shownLayer !== layer) show(token, layer); };
    passage.addEventListener("pointermove", (event) => hover(event, tokenAt(event), layer));
    passage.addEventListener("pointerleave", leave);
    passage.addEventListener("click", (event) => { const t = tokenAt(event); if (t >= 0) { pin(t, layer); centre(); } });
    map.addEventListener("pointermove", (event) => hover(event, ...cellAt(event)));
    map.addEventListener("pointerleave", leave);
    map.addEventListener("click", (event) => { const [t, l] = cellAt(event); pin(t, l); passageTo(); });
    strip.addEventListener("click", (event) => { pin(Math.min(T - 1, Math.floor((event.offsetX / strip.clientWidth) * T)), layer); centre(); });
    const passageTo = () => { const keep = scroller.scrollLeft; centre(); scroller.scrollLeft = keep; };
    passage.addEventListener("keydown", (event) => {
      const to = { ArrowLeft: token - 1, ArrowRight: token + 1, PageUp: token - 20, PageDown: token + 20, Home: 0, End: T - 1 }[event.key];
      const deeper = { ArrowUp: layer + 1, ArrowDown: layer - 1 }[event.key];
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (to !== undefined) select(to, layer);
      else if (deeper !== undefined) select(token, deeper);
      else if (event.key === "Enter" || event.key === " ") pin(token, layer);
      else if (event.key === "Escape") { pinned = false; select(...head.start); history.replaceState(null, "", location.pathname + location.search); }
      else return;
      event.preventDefault();
      if (pinned) link();
      centre(); say();
    });
    slider.addEventListener("input", () => { select(token, Number(slider.value)); if (pinned) link(); say(); });
    choose.addEventListener("change", () => { stat = Number(choose.value); restat(); if (pinned) link(); say(); });
    addEventListener("beforeprint", () => {
      if (!stats[stat].layered || L < 2) return;
      printed.replaceChildren(...Array.from({ length: Math.ceil(T / 50) }, (_, row) => {
        const from = 50 * row, to = Math.min(T, from + 50), canvas = make("canvas", { width: to - from, height: L, style: `width:${(to - from) * 12}px;height:${L * 6}px` });
        paint(canvas, from, to, deepFirst);
        return canvas;
      }));
    });

    const restore = () => {
      const wanted = decodeURIComponent(location.hash).match(/^#tv=([^,]+),t(\d+),l(\d+)(?:,(.+))?$/);
      if (!wanted || wanted[1] !== id) return false;
      stat = Math.max(0, stats.findIndex((one) => one.key === wanted[4]));
      choose.value = stat; pinned = true;
      restat(); select(Number(wanted[2]), Number(wanted[3]));
      return true;
    };
    restat(); select(token, layer); slider.value = layer;
    restore(); centre();
    addEventListener("hashchange", () => { if (restore()) { root.scrollIntoView(); centre(); } });
    root.classList.add("ready");
  };

  const open = async (root) => {
    const head = parsed(".tv-head", root);
    build(root, head, unpack(head, await inflate($(".tv-data", root).textContent)));
  };
  const views = $$(".tv");
  if (!canInflate && views.length) notice("This browser is too old for the token views; the passages are shown as they are.");
  else {
    const linked = decodeURIComponent(location.hash).match(/^#tv=([^,]+),/)?.[1];
    const first = views.find((view) => view.dataset.id === linked);
    if (first) open(first).then(() => first.scrollIntoView());
    near(views.filter((view) => view !== first), "400px", open);
  }
}
