
{ // Charts: static pictures that Vega replaces near the viewport; every picture can be saved without it.
  const light = parsed("#light");
  const fixed = (text) => text.replace(/var\(--([a-z0-9-]+)\)/g, (_, role) => light[role]);
  const escaped = (text) => text.replace(/[&<>"]/g, (sign) => `&#${sign.charCodeAt(0)};`);
  const wrapped = (text, width) => text.split(/\s+/).reduce((rows, word) => {
    const last = rows[rows.length - 1];
    if (last && last.length + word.length < width) rows[rows.length - 1] = `${last} ${word}`; else rows.push(word);
    return rows;
  }, []);
  const titled = (figure) => { // the static picture with its title, on light paper
    const spec = parsed(".spec", figure), picture = $("svg.static", figure);
    const [, , width, height] = picture.getAttribute("viewBox").split(" ").map(Number);
    const rows = [...wrapped(spec.title.text, 84).map((row) => [row, 15, 600, "ink"]), ...wrapped(spec.title.subtitle, 108).map((row) => [row, 12.5, 400, "muted"])];
    const top = 20 * rows.length + 16;
    const text = rows.map(([row, size, weight, role], i) => `<text x="12" y="${26 + 20 * i}" font-family="${light.font}" font-size="${size}" font-weight="${weight}" fill="${light[role]}">${escaped(row)}</text>`).join("");
    const inner = fixed(new XMLSerializer().serializeToString(picture)).replace(/^<svg /, `<svg x="6" y="${top}" width="${width}" height="${height}" `);
    const w = width + 12, h = height + top + 10;
    return { w, h, text: `<svg xmlns="http://www.w3.org/2000/svg" width="${w}" height="${h}" viewBox="0 0 ${w} ${h}"><rect width="100%" height="100%" fill="${light.paper}"/>${text}${inner}</svg>` };
  };
  const drawn = async (figure) => {
    const { w, h, text } = titled(figure), image = new Image();
    image.src = URL.createObjectURL(new Blob([text], { type: "image/svg+xml" }));
    await image.decode();
    const canvas = make("canvas", { width: 2 * w, height: 2 * h });
    canvas.getContext("2d").drawImage(image, 0, 0, 2 * w, 2 * h);
    URL.revokeObjectURL(image.src);
    return new Promise((done) => canvas.toBlob(done, "image/png"));
  };
  const rowsOf = (spec) => {
    const sets = [...Object.values(spec.datasets ?? {}), ...[spec, ...(spec.layer ?? [])].map((part) => part.data?.values ?? [])].filter((rows) => rows.length);
    const rows = sets.sort((a, b) => b.length - a.length)[0] ?? [], names = [...new Set(rows.flatMap(Object.keys))];
    return [names, ...rows.map((row) => names.map((name) => row[name] ?? ""))].map(csvLine).join("\n") + "\n";
  };
  const saved = {
    svg: (figure, id) => save(`${id}.svg`, titled(figure).text, "image/svg+xml"),
    png: async (figure, id) => save(`${id}.png`, await drawn(figure)),
    csv: (figure, id) => save(`${id}.csv`, rowsOf(parsed(".spec", figure)), "text/csv"),
    spec: (figure, id) => save(`${id}.vl.json`, JSON.stringify(parsed(".spec", figure), null, 1), "application/json"),
  };
  for (const figure of $$("figure.chart")) {
    const tools = $(".tools", figure);
    tools.hidden = false;
    tools.addEventListener("click", (event) => {
      const kind = event.target.dataset.save;
      if (kind) saved[kind](figure, figure.id.replace(/^fig-/, ""));
    });
  }

  let vega; // one promise for the whole page
  const start = () => (vega ??= inflate($("#vega").textContent).then((code) => {
    const nonce = $("script[nonce]").nonce;
    document.head.append(make("script", { nonce }, new TextDecoder().decode(code)));
    if (!window.vegaEmbed) throw new Error("Vega did not start");
    return window.vegaEmbed;
  }));
  const refuse = () => Promise.reject(new Error("a report loads nothing"));
  const hydrate = async (figure) => {
    try {
      const embed = await start(), spec = parsed(".spec", figure), host = make("div", { "aria-hidden": "true" });
      delete spec.title;
      const picture = $(".picture", figure);
      picture.append(host);
      $(".plot", figure).classList.add("drawn");
      await embed(host, spec, {
        ast: true, renderer: "svg", actions: false, tooltip: { disableDefaultStyle: true },
        loader: { load: refuse, sanitize: refuse, http: refuse, file: refuse },
      });
      figure.classList.add("live");
    } catch (error) {
      $(".plot", figure).classList.remove("drawn");
      notice(`The charts stay pictures: ${error.message}.`);
    }
  };
  if ($("#vega")) {
    if (canInflate) near($$("figure.chart"), "200px", hydrate);
    else notice("This browser is too old to make the charts interactive; the pictures are complete.");
  }
}
