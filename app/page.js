// The page's script, of which search.js, documents.js, compare.js, map.js and start.js are further parts. It runs once, when
// Gradio has put page.html into `element`; `server` calls the functions of page.py.
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
  showOffer();
  if (!isOther) return;
  const wasShown = shown || similar;
  similar = null;
  sources = [];
  clearResults();
  say("status", "");
  if (wasShown && $("query").value.trim()) search();
  update();
}

// A collection of another engine cannot be searched; it can be indexed again with this one.
function offered() {
  return collections.find(({ name }) => name === chosen)?.offer || "";
}
function showOffer() {
  for (const offer of element.querySelectorAll(".offer")) {
    offer.hidden = !offered();
    offer.querySelector("p").textContent = offered();
    offer.querySelector("button").disabled = busy;
  }
}
for (const button of element.querySelectorAll(".offer button"))
  button.addEventListener("click", async () => {
    busy = true;
    showOffer();
    try {
      await call("index_again", { client, collection: chosen });
    } catch (error) {
      say("status", error.message, true);
      say("state", error.message, true);
    }
    update();
  });

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
  const options = JSON.stringify(state.collections.map(({ name, label, damaged }) => [name, label, damaged]));
  collections = state.collections;
  if ($("collection").lastOptions !== options) {
    for (const select of [$("collection"), $("documents-collection")]) {
      select.replaceChildren(
        ...collections.map(({ name, label, damaged }) => {
          const option = new Option(label, name);
          option.disabled = damaged && select.id === "collection";
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
  showOffer();
  if (map && current && !$("view-map").hidden && !map.version.startsWith(current.identity)) drawMap();
  updating = setTimeout(update, state.busy ? 1000 : document.hidden ? 30000 : 5000);
}
document.addEventListener("visibilitychange", () => document.hidden || update());
