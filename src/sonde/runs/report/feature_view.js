// Latents: an index that is sorted and searched, and the card of the chosen one. Cards arrive as finished HTML.
for (const box of $$(".fv")) {
  const id = box.dataset.id, controls = $(".controls", box), body = $(".index tbody", box), place = $(".fcard", box);
  const said = $(".sr", box), heads = $$(".index thead th", box), count = $(".fcount", box), more = $(".fmore", box);
  if (!canInflate) continue;
  const STEP = 100;
  let data, shown = [], limit = STEP, current = +box.dataset.start, sorted = null;
  const link = (row) => {
    const node = make("a", { href: `#${id}/${row.n}` }, String(row.n));
    if (row.n === current) node.setAttribute("aria-current", "true");
    return node;
  };
  const line = (row) => {
    const cells = [make("th", { scope: "row", class: "num" }, link(row)),
      make("td", { class: row.explained ? false : "none" }, make("span", { class: "clip" }, row.says || "–")),
      make("td", {}, row.token ? make("code", {}, row.token) : "–"),
      make("td", { class: "num" }, row.rate_text), make("td", { class: "num" }, row.largest_text),
      ...row.score_texts.map((text) => make("td", { class: "num" }, text)), make("td", {}, row.status)];
    const node = make("tr", { class: row.n === current ? "at" : false }, ...cells);
    node.addEventListener("click", (event) => { if (!event.target.closest("a")) location.hash = `${id}/${row.n}`; });
    return node;
  };
  const draw = () => {
    body.replaceChildren(...shown.slice(0, limit).map(line));
    count.textContent = `${shown.length.toLocaleString("en")} of ${data.rows.length.toLocaleString("en")} latents`;
    more.hidden = shown.length <= limit;
  };
  const value = (row, key) => (key.startsWith("score") ? row.scores[+key.slice(5)] : row[key]);
  const choose = () => {
    const words = $("input[type=search]", controls).value.toLowerCase().split(/\s+/).filter(Boolean);
    const status = $("select", controls).value;
    shown = data.rows.filter((row) => (!status || row.status === status) && words.every((word) => row.find.includes(word)));
    const { key, sign } = sorted ?? {};
    if (sorted) shown.sort((one, two) => {
      const a = value(one, key), b = value(two, key);
      if (a == null || a === "" || b == null || b === "") return ((a == null || a === "") - (b == null || b === "")) || one.n - two.n;
      return sign * (typeof a === "number" ? a - b : a.localeCompare(b)) || one.n - two.n;
    });
    limit = STEP;
    draw();
  };
  const bare = (row) => make("article", { class: "feature" },
    make("div", { class: "fhead" }, make("h4", { tabindex: "-1" }, `Latent ${row.n}`), make("span", { class: "fstatus" }, row.status)),
    make("p", { class: "says none" }, row.says || "No explanation."),
    make("p", { class: "note" }, `Fires at ${row.rate_text} of tokens` + (row.largest === null ? "." : `, at most with ${row.largest_text}. No windows are in this page: sonde features show SOURCE ${row.n} writes them.`)));
  const open = (number, focus) => {
    const row = data.rows.find((one) => one.n === number);
    if (!row) return;
    current = number;
    if (String(number) in data.cards) place.innerHTML = data.cards[number];
    else place.replaceChildren(bare(row));
    draw();
    if (focus) {
      place.scrollIntoView({ block: "nearest" });
      if (place.getBoundingClientRect().top > innerHeight / 2) place.scrollIntoView();
      $("h4", place).focus({ preventScroll: true });
      said.textContent = `Latent ${number}`;
    }
  };
  const wanted = () => {
    const [view, number] = decodeURIComponent(location.hash.slice(1)).split("/");
    return view === id && /^\d+$/.test(number ?? "") ? +number : null;
  };
  const step = (by) => {
    const at = shown.findIndex((row) => row.n === current), next = shown[at < 0 ? 0 : at + by];
    if (next) location.hash = `${id}/${next.n}`;
  };
  let begun;
  const begin = () => begun ??= (async () => {
    data = JSON.parse(new TextDecoder().decode(await inflate($(".fv-data", box).textContent)));
    heads.forEach((head) => {
      const button = make("button", { type: "button" }, head.textContent.trim());
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const direction = head.getAttribute("aria-sort") === "descending" ? "ascending" : head.hasAttribute("aria-sort") ? "descending" : head.dataset.first;
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", direction);
        sorted = { key: head.dataset.key, sign: direction === "ascending" ? 1 : -1 };
        choose();
      });
    });
    $("input[type=search]", controls).addEventListener("input", choose);
    $("select", controls).addEventListener("change", choose);
    $("input[type=checkbox]", controls).addEventListener("change", (event) => box.classList.toggle("nums", event.target.checked));
    $("[data-step='-1']", controls).addEventListener("click", () => step(-1));
    $("[data-step='1']", controls).addEventListener("click", () => step(1));
    more.addEventListener("click", () => { limit += STEP; draw(); });
    controls.hidden = false;
    choose();
  })();
  const follow = async () => {
    const number = wanted();
    if (number === null) return;
    await begin();
    open(number, true);
  };
  addEventListener("hashchange", follow);
  near([box], "600px", begin);
  follow();
}
