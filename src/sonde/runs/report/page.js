"use strict";
// Shared by the parts below: small DOM makers, downloads, unpacking of compressed text.
const $ = (selector, from = document) => from.querySelector(selector);
const $$ = (selector, from = document) => [...from.querySelectorAll(selector)];
const make = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== false && value != null) node.setAttribute(name, value);
  node.append(...children);
  return node;
};
const notice = (text) => { $("#notice").textContent = text; };
const parsed = (selector, from) => JSON.parse($(selector, from).textContent);
const canInflate = typeof DecompressionStream === "function";
const inflate = async (base64) => {
  const packed = Uint8Array.from(atob(base64), (sign) => sign.charCodeAt(0));
  return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
};
const save = (name, content, type) => {
  const link = make("a", { download: name, href: URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type })) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
};
const copy = async (text, button) => {
  try { await navigator.clipboard.writeText(text); }
  catch { // from file:// some browsers have no clipboard
    const area = make("textarea", { style: "position:fixed;opacity:0" });
    area.value = text; document.body.append(area); area.select(); document.execCommand("copy"); area.remove();
  }
  const before = button.textContent;
  button.textContent = "Copied"; notice("Copied to the clipboard");
  setTimeout(() => { button.textContent = before; }, 1500);
};
const csvLine = (cells) => cells.map((cell) => (/[",\n\r]/.test(cell) ? `"${String(cell).replaceAll('"', '""')}"` : cell)).join(",");
const slug = document.title.toLowerCase().replace(/[^a-z0-9]+/g, "-");
const near = (nodes, margin, act) => {
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) { watcher.unobserve(entry.target); act(entry.target); }
  }, { rootMargin: margin });
  nodes.forEach((node) => watcher.observe(node));
};

{ // Theme: the system's, until the button or ?theme= says otherwise.
  const root = document.documentElement, button = $("#theme"), dark = matchMedia("(prefers-color-scheme: dark)");
  const asked = new URLSearchParams(location.search).get("theme");
  if (asked === "light" || asked === "dark") root.dataset.theme = asked;
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const label = () => { button.textContent = isDark() ? "Light" : "Dark"; button.setAttribute("aria-label", `Switch to the ${isDark() ? "light" : "dark"} theme`); };
  button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; label(); });
  dark.addEventListener("change", label);
  label(); button.hidden = false;
}

{ // Contents: mark the part that is being read.
  const links = new Map($$("nav.side a").map((link) => [link.hash.slice(1), link]));
  const seen = new Set();
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) seen[entry.isIntersecting ? "add" : "delete"](entry.target.id);
    const first = [...links.keys()].find((id) => seen.has(id));
    links.forEach((link, id) => (id === first ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current")));
  }, { rootMargin: "-10% 0px -60% 0px" });
  links.forEach((_, id) => { const part = document.getElementById(id); if (part) watcher.observe(part); });
  $$("nav.top a").forEach((link) => link.addEventListener("click", () => { $("nav.top details").open = false; }));
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-copy]");
  if (button) copy($("code", button.parentElement).textContent, button);
  const mark = event.target.closest(".para");
  if (mark) copy(mark.href, mark);
});

const openTarget = () => { // a link into a closed list opens it
  const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const closed = target && target.closest("details:not([open])");
  if (closed) { closed.open = true; target.scrollIntoView(); }
};
addEventListener("hashchange", openTarget);
openTarget();
addEventListener("beforeprint", () => $$("details").forEach((part) => { part.open = true; }));

// Tables: sort by the exact values, copy as tab-separated text, save as CSV.
const exact = (cell) => cell.dataset.v ?? cell.textContent;
for (const box of $$(".table")) {
  const table = $("table", box), tools = $(".tools", box);
  if (!table || !tools) continue;
  tools.hidden = false;
  const heads = $$("thead th", table), names = heads.map((head) => head.textContent.trim());
  heads.forEach((head, column) => {
    const button = make("button", { type: "button" }, names[column]);
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const direction = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", direction);
      const sign = direction === "ascending" ? 1 : -1, numeric = head.classList.contains("num");
      const rows = $$("tbody tr", table).map((row) => [exact(row.cells[column]), row]);
      rows.sort(([a], [b]) => {
        if (a === "" || b === "") return (a === "") - (b === ""); // gaps stay last
        return sign * (numeric ? a - b : a.localeCompare(b));
      });
      $("tbody", table).append(...rows.map(([, row]) => row));
    });
  });
  const lines = () => [names, ...$$("tbody tr", table).map((row) => [...row.cells].map(exact))];
  $("[data-copy-table]", tools).addEventListener("click", (event) => copy(lines().map((cells) => cells.join("\t")).join("\n"), event.target));
  $("[data-save-table]", tools).addEventListener("click", async () => {
    const packed = $("script.csv", box);
    const text = packed ? await inflate(packed.textContent) : lines().map(csvLine).join("\n") + "\n";
    save(`${table.dataset.id}.csv`, text, "text/csv");
  });
}
