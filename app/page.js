// The page's script. It runs once, when Gradio has put page.html into `element`; `server` calls the functions of page.py.
// Answers carry HTML that cards.py has made and escaped; every other text is set with textContent.
const $ = (id) => element.querySelector(`#${id}`);
const VIEWS = ["search", "documents", "compare", "map", "engine"];
const client = sessionStorage.getItem("client") || crypto.getRandomValues(new Uint32Array(4)).join("-");
sessionStorage.setItem("client", client);
let collections = [], chosen = "", live = false, busy = false;
let asked = 0; // number of the last search: the answer to any other one is dropped
let shown = null; // request and answer of the results on the page
let similar = null; // row and lineage of the passage that "more like this" asks for
let sources = [];
let instruction = null; // the visitor's own, or null for that of the collection

async function call(name, data) {
  let answer;
  try {
    answer = await server[name](data);
  } catch {
    throw new Error("the page's server does not answer; start it again, or reload the page if you were logged out");
  }
  if (!answer || answer.error || answer.detail)
    throw new Error((answer && answer.error) || "the page's server does not answer as expected; reload the page");
  return answer;
}

function say(id, text, isError = false) {
  const line = $(id);
  line.classList.toggle("error", isError);
  if (line.textContent !== text) line.textContent = text;
}

function setHtml(node, html) {
  if (node.lastHtml === html) return;
  const focused = node.contains(document.activeElement) ? { ...document.activeElement.dataset } : null;
  node.innerHTML = node.lastHtml = html;
  if (focused)
    for (const button of node.querySelectorAll("button"))
      if (JSON.stringify({ ...button.dataset }) === JSON.stringify(focused)) button.focus();
}

// Search ---------------------------------------------------------------------------------------------------------------

function request() {
  return {
    collection: $("collection").value,
    query: $("query").value.trim(),
    instruction: $("instruction").value,
    count: Number($("count").value),
    mode: element.querySelector("input[name=mode]:checked")?.value,
    sources,
    ...(similar || {}),
  };
}

function clearResults() {
  asked += 1;
  shown = null;
  $("results").replaceChildren();
  $("results").classList.remove("old");
  $("facets").hidden = true;
  $("export").disabled = true;
}

async function search({ typed = false, quiet = false } = {}) {
  const number = (asked += 1);
  const data = request();
  if (!collections.length) return say("status", "The first passages are being indexed; search again in a few seconds.");
  if (!data.query && !similar) {
    clearResults();
    say("status", typed ? "" : "Enter a query first.", !typed);
    $("examples").hidden = !chosen.startsWith("Python");
    return;
  }
  const started = performance.now();
  $("results").classList.add("old");
  $("results").setAttribute("aria-busy", "true");
  $("examples").hidden = true;
  if (!typed && !quiet) {
    saveUrl();
    say("status", "Searching…");
  }
  let answer;
  try {
    answer = await call("search", data);
  } catch (error) {
    if (number === asked) {
      clearResults();
      say("status", error.message, true);
    }
    return;
  }
  if (number !== asked) return;
  live = answer.live;
  shown = { data, answer, seconds: (performance.now() - started) / 1000 };
  $("results").innerHTML = answer.html;
  $("results").classList.remove("old");
  $("results").removeAttribute("aria-busy");
  $("export").disabled = !answer.rows.length;
  showFacets(answer.facets || []);
  say("status", summary(answer.far));
  $("status").title = Object.entries(answer.times).map(([step, ms]) => `${step} ${ms} ms`).join(", ");
  performance.mark("hits");
  if (similar || !answer.rows.length) return;
  if (typed) await new Promise((done) => setTimeout(done, 350));
  if (number === asked) await mark(number, data, answer);
}

function summary(isFar) {
  return isFar ? shown.answer.nothing : `${shown.answer.summary}, ${shown.seconds.toFixed(shown.seconds < 0.1 ? 3 : 2)} s`;
}

async function mark(number, data, { rows, lineage }) {
  let answer;
  try {
    answer = await call("marks", { ...data, rows, lineage });
  } catch {
    return; // the hits are right without their marks
  }
  if (number !== asked) return;
  for (const [row, snippet, whole, isFar] of answer.marks) {
    const hit = $("results").querySelector(`[data-row="${row}"]`);
    hit.querySelector(".snippet").innerHTML = snippet;
    hit.querySelector(".whole .text").innerHTML = whole;
    hit.classList.toggle("far", isFar);
  }
  say("status", summary(answer.far));
  performance.mark("marks");
}

function showFacets(facets) {
  $("facets").hidden = !facets.length;
  $("facets").replaceChildren(
    ...facets.map(([name, count]) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = count === null ? name : `${name} ${count}`;
      button.setAttribute("aria-pressed", String(sources.includes(name)));
      button.onclick = () => {
        sources = sources.includes(name) ? sources.filter((other) => other !== name) : [...sources, name];
        search();
      };
      return button;
    }),
  );
}

function saveUrl() {
  const url = new URL(location.href);
  for (const [name, value] of [["q", $("query").value.trim()], ["in", chosen], ["mode", request().mode || ""]])
    value ? url.searchParams.set(name, value) : url.searchParams.delete(name);
  url.searchParams.delete("source");
  for (const source of sources) url.searchParams.append("source", source);
  history.replaceState(history.state, "", url);
}

let typing;
$("query").addEventListener("input", () => {
  clearTimeout(typing);
  similar = null;
  if (shown || !$("query").value) $("results").classList.add("old");
  asked += 1; // what runs is for another text
  if (live || !$("query").value.trim()) typing = setTimeout(() => search({ typed: true }), 120);
  else if (shown) {
    clearResults();
    say("status", "");
  }
});
$("search-form").addEventListener("submit", (event) => {
  event.preventDefault();
  clearTimeout(typing);
  similar = null;
  search();
});
$("collection").addEventListener("change", () => choose($("collection").value));
$("documents-collection").addEventListener("change", () => choose($("documents-collection").value));
$("count").addEventListener("change", refresh);
$("instruction").addEventListener("change", () => {
  instruction = $("instruction").value;
  showPreset();
  refresh();
});
$("preset").addEventListener("change", () => {
  instruction = $("instruction").value = $("preset").value;
  refresh();
});
for (const radio of element.querySelectorAll("input[name=mode]")) radio.addEventListener("change", refresh);
$("examples").addEventListener("click", (event) => {
  if (!event.target.matches(".example")) return;
  $("query").value = event.target.textContent;
  $("query").focus();
  search();
});
$("results").addEventListener("click", (event) => {
  const hit = event.target.closest(".hit");
  if (event.target.closest(".title")) {
    const whole = hit.querySelector(".whole"), isOpen = whole.hidden;
    whole.hidden = !isOpen;
    hit.querySelector(".snippet").hidden = isOpen;
    hit.querySelector(".title").setAttribute("aria-expanded", String(isOpen));
  } else if (event.target.matches(".similar")) {
    similar = { similar: Number(hit.dataset.row), lineage: shown.answer.lineage };
    search().then(() => $("results").querySelector(".title")?.focus());
  }
});

function refresh() {
  if (shown || similar) search();
}

function showPreset() {
  const known = [...$("preset").options].some((option) => option.value === $("instruction").value);
  $("preset").value = known ? $("instruction").value : "custom";
}

$("export").addEventListener("click", async () => {
  try {
    const { csv } = await call("export", { ...shown.data, lineage: shown.answer.lineage });
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(["\ufeff", csv], { type: "text/csv" }));
    link.download = `results ${(shown.data.query || "similar").slice(0, 40).replace(/[^\p{L}\p{N} ]+/gu, " ").trim()}.csv`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  } catch (error) {
    say("status", error.message, true);
  }
});

document.addEventListener("keydown", (event) => {
  if (!element.isConnected || event.ctrlKey || event.metaKey || event.altKey || $("confirm").open) return;
  const isTyping = event.target.matches("input:not([type=radio]), select, textarea");
  const titles = [...$("results").querySelectorAll(".title")];
  const at = titles.indexOf(document.activeElement);
  if (event.key === "/" && !isTyping) {
    event.preventDefault();
    show("search");
    $("query").select();
  } else if (event.key === "Escape" && !$("view-search").hidden) {
    if (at >= 0) $("query").focus();
    else if (document.activeElement === $("query") && $("query").value) {
      event.preventDefault();
      $("query").value = "";
      $("query").dispatchEvent(new Event("input"));
    }
  } else if ((event.key === "ArrowDown" || event.key === "ArrowUp") && titles.length) {
    const next = at + (event.key === "ArrowDown" ? 1 : -1);
    if (at < 0 && (document.activeElement !== $("query") || event.key === "ArrowUp")) return;
    event.preventDefault();
    (titles[Math.min(next, titles.length - 1)] || $("query")).focus();
  }
});

// Views, collections and what runs on the server -----------------------------------------------------------------------

function show(view, moveFocus = false) {
  if (!VIEWS.includes(view)) view = "search";
  for (const name of VIEWS) {
    $(`view-${name}`).hidden = name !== view;
    const link = element.querySelector(`nav a[href="#${name}"]`);
    name === view ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
  }
  if (view === "search") $("query").focus({ preventScroll: true });
  else if (moveFocus) $(`heading-${view}`).focus({ preventScroll: true });
  if (view === "map") drawMap();
  if (view === "compare" && !$("compare-query").value) $("compare-query").value = $("query").value;
}
element.querySelector("nav").addEventListener("click", (event) => {
  const link = event.target.closest('a[href^="#"]');
  if (!link) return;
  event.preventDefault();
  history.replaceState(history.state, "", link.getAttribute("href"));
  show(link.getAttribute("href").slice(1), true);
});
window.addEventListener("hashchange", () => show(location.hash.slice(1)));

function choose(name) {
  const isOther = name !== chosen;
  chosen = name;
  for (const id of ["collection", "documents-collection"]) $(id).value = name;
  $("files-collection").textContent = name;
  const state = collections.find((collection) => collection.name === name);
  $("instruction").value = instruction ?? state?.instruction ?? "";
  showPreset();
  $("delete").hidden = !state || name.startsWith("Python documentation");
  $("delete").textContent = `Delete ${name}`;
  $("examples").hidden = Boolean(shown || $("query").value) || !name.startsWith("Python");
  if (!isOther) return;
  const wasShown = shown || similar;
  similar = null;
  sources = [];
  clearResults();
  say("status", "");
  if (wasShown && $("query").value.trim()) search();
  update();
}

let updating, updates = 0;
async function update() {
  clearTimeout(updating);
  const number = (updates += 1);
  let state;
  try {
    state = await call("state", { client, collection: chosen });
  } catch (error) {
    if (number !== updates) return;
    say("growing", error.message);
    updating = setTimeout(update, 5000);
    return;
  }
  if (number !== updates) return;
  const options = JSON.stringify(state.collections.map(({ name, label, usable }) => [name, label, usable]));
  collections = state.collections;
  if ($("collection").lastOptions !== options) {
    for (const select of [$("collection"), $("documents-collection")]) {
      select.replaceChildren(
        ...collections.map(({ name, label, usable }) => {
          const option = new Option(label, name);
          option.disabled = !usable && select.id === "collection";
          return option;
        }),
      );
      select.value = chosen;
    }
    $("collection-names").replaceChildren(...collections.slice(1).map(({ name }) => new Option(name)));
    $("collection").lastOptions = options;
  }
  const wanted = collections.some(({ name }) => name === chosen) ? chosen : state.chosen;
  if (collections.length && (wanted !== chosen || !$("instruction").lastChosen)) {
    $("instruction").lastChosen = true;
    const first = !chosen || wanted === chosen;
    if (first) chosen = wanted;
    choose(wanted);
  }
  setHtml($("file-list"), state.files);
  setHtml($("jobs"), state.jobs);
  say("growing", state.growing || state.failed);
  live = state.live;
  const current = collections.find(({ name }) => name === chosen);
  if (shown && current && current.identity !== shown.answer.identity && !$("results").classList.contains("old")) {
    if (!state.growing) refresh(); // a file was added or deleted: what stands here is no longer true
  }
  if (busy && !state.busy && state.jobs) say("state", "Done: each file and what became of it stands below.");
  busy = state.busy;
  updating = setTimeout(update, state.busy ? 1000 : document.hidden ? 30000 : 5000);
}
document.addEventListener("visibilitychange", () => document.hidden || update());

// Your documents -------------------------------------------------------------------------------------------------------

let files = [];
function take(list) {
  files = [...list];
  const bytes = files.reduce((sum, file) => sum + file.size, 0);
  $("chosen").textContent = files.length
    ? `${files.length === 1 ? files[0].name : `${files.length} files`}, ${(bytes / 1e6).toFixed(1)} MB`
    : "";
}
$("files").addEventListener("change", () => take($("files").files));
for (const name of ["dragover", "dragleave", "drop"])
  element.addEventListener(name, (event) => {
    if (![...(event.dataTransfer?.types || [])].includes("Files")) return;
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragover");
    if (name === "drop") {
      show("documents");
      take(event.dataTransfer.files);
    }
  });
$("add-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (!files.length) return say("state", "Choose files to add first.", true);
  const name = $("collection-name").value.trim(), paths = [], refused = [];
  $("add").disabled = true;
  try {
    for (const [index, file] of files.entries()) {
      say("state", `Uploading ${index + 1} of ${files.length}: ${file.name}`);
      try {
        paths.push((await upload(file)).path);
      } catch {
        refused.push(file.name);
      }
    }
    if (!paths.length) throw new Error(`The upload of ${refused.join(", ")} was refused, perhaps it is too large.`);
    await call("add", { client, collection: name, paths });
    files = [];
    $("files").value = $("chosen").textContent = "";
    const note = refused.length ? ` Not uploaded, perhaps too large: ${refused.join(", ")}.` : "";
    say("state", `Adding to ${name}.${note} You can search meanwhile.`, Boolean(note));
    busy = true;
    await update();
    if (collections.some((collection) => collection.name === name)) choose(name);
    else pending = name;
  } catch (error) {
    say("state", error.message, true);
  } finally {
    $("add").disabled = false;
  }
});
let pending = ""; // a collection that is not there yet, to be chosen when it is
setInterval(() => {
  if (pending && collections.some(({ name }) => name === pending)) {
    choose(pending);
    pending = "";
  }
}, 500);
$("jobs").addEventListener("click", async (event) => {
  const job = event.target.closest("[data-cancel]")?.dataset.cancel;
  if (!job) return;
  try {
    await call("cancel", { client, job: Number(job) });
    say("state", "Cancelling: nothing of the unfinished file stays.");
  } catch (error) {
    say("state", error.message, true);
  }
  update();
});

function confirmDelete(text) {
  $("confirm-text").textContent = text;
  $("confirm").showModal();
  $("confirm-no").focus();
  return new Promise((done) => {
    $("confirm").onclose = () => done($("confirm").returnValue === "yes");
    $("confirm-yes").onclick = () => $("confirm").close("yes");
    $("confirm-no").onclick = () => $("confirm").close("no");
    $("confirm").oncancel = () => ($("confirm").returnValue = "no");
  });
}
async function remove(text, data) {
  if (!(await confirmDelete(text))) return;
  try {
    say("state", (await call("delete", data)).message);
  } catch (error) {
    say("state", error.message, true);
  }
  await update();
}
$("delete").addEventListener("click", () =>
  remove(`Delete the collection ${chosen} with all its files, for everyone who uses this page?`, { collection: chosen }),
);
$("file-list").addEventListener("click", (event) => {
  const file = event.target.closest("[data-delete-file]")?.dataset.deleteFile;
  if (file) remove(`Delete ${file} from ${chosen}?`, { collection: chosen, file });
});

// Compare --------------------------------------------------------------------------------------------------------------

$("right").selectedIndex = $("right").options.length - 1;
let compared = 0;
$("compare-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const number = (compared += 1);
  $("comparison").replaceChildren();
  say("compare-status", "Comparing… an engine that is chosen for the first time has to be opened.");
  try {
    const data = { ...request(), query: $("compare-query").value, left: $("left").value, right: $("right").value };
    const { html } = await call("compare", data);
    if (number !== compared) return;
    $("comparison").innerHTML = html;
    say("compare-status", "");
  } catch (error) {
    if (number === compared) say("compare-status", error.message, true);
  }
});

// Map ------------------------------------------------------------------------------------------------------------------

const LIGHT = ["#33669a", "#3d7a35", "#b35c00", "#7d4f78", "#2f7f7a", "#8a6d00", "#6d4f3c", "#b0455a", "#8b939c"];
const DARK = ["#7fb2e5", "#86cf7b", "#ffb066", "#d3a5cd", "#7fd3cd", "#e6cd55", "#c7a68f", "#ff9daf", "#77808a"];
let map = null, mapped = 0;
async function drawMap() {
  const number = (mapped += 1);
  say("map-status", "Drawing…");
  try {
    const data = shown ? { ...shown.data, rows: shown.answer.rows, lineage: shown.answer.lineage } : { collection: chosen };
    map = await call("map", data);
  } catch (error) {
    if (number === mapped) say("map-status", error.message, true);
    return;
  }
  if (number !== mapped) return;
  const sample = map.points.length < map.total ? `${map.points.length} of ` : "";
  say("map-status", `${sample}${map.total} passages of ${chosen}`);
  paint();
}
function place() {
  const canvas = $("plane"), scale = window.devicePixelRatio || 1;
  const { clientWidth: width, clientHeight: height } = canvas;
  canvas.width = width * scale;
  canvas.height = height * scale;
  const all = map.query ? [...map.points, map.query] : map.points;
  const range = (axis) => {
    const values = all.map((point) => point[axis]);
    const [low, high] = values.reduce(([a, b], value) => [Math.min(a, value), Math.max(b, value)], [1e9, -1e9]);
    return [low, high - low || 1];
  };
  const [left, spanX] = range(0), [bottom, spanY] = range(1);
  map.at = ([x, y]) => [12 + ((x - left) / spanX) * (width - 24), height - 12 - ((y - bottom) / spanY) * (height - 24)];
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  return context;
}
function paint() {
  if (!map || $("view-map").hidden) return;
  const context = place(), isDark = Boolean(element.closest(".dark"));
  const colours = isDark ? DARK : LIGHT, ink = getComputedStyle($("plane")).color;
  const colour = (index) => (index < map.sources.length ? colours[index] : colours[8]);
  $("legend").replaceChildren(
    ...[...map.sources, ...(map.points.some((point) => point[2] >= map.sources.length) ? ["others"] : [])].map((name, index) => {
      const item = document.createElement("li"), dot = document.createElement("i");
      dot.style.background = colour(index);
      item.append(dot, name);
      return item;
    }),
  );
  context.globalAlpha = 0.75;
  for (const point of map.points) {
    const [x, y] = map.at(point);
    context.fillStyle = colour(point[2]);
    context.fillRect(x - 1.5, y - 1.5, 3, 3);
  }
  context.globalAlpha = 1;
  context.strokeStyle = context.fillStyle = ink;
  context.lineWidth = 2;
  for (const point of map.points.filter((other) => map.hits.includes(other[3]))) {
    const [x, y] = map.at(point);
    context.beginPath();
    context.arc(x, y, 6, 0, 7);
    context.stroke();
  }
  if (map.query) {
    const [x, y] = map.at(map.query);
    context.beginPath();
    for (const [dx, dy] of [[8, 8], [8, -8]]) {
      context.moveTo(x - dx, y - dy);
      context.lineTo(x + dx, y + dy);
    }
    context.stroke();
  }
}
function nearest(event) {
  if (!map?.at) return null;
  const box = $("plane").getBoundingClientRect();
  let best = null, distance = 14;
  for (const point of map.points) {
    const [x, y] = map.at(point);
    const away = Math.hypot(x - (event.clientX - box.left), y - (event.clientY - box.top));
    if (away < distance) [best, distance] = [point, away];
  }
  return best;
}
$("plane").addEventListener("mousemove", (event) => ($("plane").title = nearest(event)?.[4] || ""));
$("plane").addEventListener("click", async (event) => {
  const point = nearest(event);
  if (!point) return;
  try {
    const { title, source, html } = await call("passage", { collection: chosen, row: point[3], lineage: map.lineage });
    const heading = document.createElement("h3"), origin = document.createElement("p"), text = document.createElement("div");
    heading.textContent = title;
    heading.dir = text.dir = "auto";
    origin.textContent = source;
    origin.className = "hint";
    text.innerHTML = html;
    text.className = "snippet";
    $("point").replaceChildren(heading, origin, text);
  } catch (error) {
    say("map-status", error.message, true);
  }
});
window.addEventListener("resize", paint);

// Start ----------------------------------------------------------------------------------------------------------------

if ($("logout")) $("logout").href = `${window.gradio_config?.root ?? ""}/logout`;
const parameters = new URL(location.href).searchParams;
$("query").value = parameters.get("q") || "";
chosen = parameters.get("in") || "";
sources = parameters.getAll("source");
const mode = element.querySelector(`input[name=mode][value="${CSS.escape(parameters.get("mode") || "meaning")}"]`);
if (mode) mode.checked = true;
update().then(() => {
  show(location.hash.slice(1));
  if ($("query").value) search();
});
