// The search view: asking, showing and marking hits, filters, keys.

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
  if (offered()) return say("status", ""); // the offer stands there
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
  sources = answer.sources; // without those that are gone
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
  if (url.href !== location.href) history.pushState(history.state, "", url); // the browser's Back goes to the last search
}

// Takes the query, mode and filters of the address, and returns its collection.
function readUrl() {
  const parameters = new URL(location.href).searchParams, mode = CSS.escape(parameters.get("mode") || "meaning");
  const radio = element.querySelector(`input[name=mode][value="${mode}"]`);
  if (radio) radio.checked = true;
  $("query").value = parameters.get("q") || "";
  similar = null;
  sources = parameters.getAll("source");
  return parameters.get("in") || "";
}
window.addEventListener("popstate", () => {
  if (!element.isConnected) return;
  clearResults();
  const name = readUrl(), kept = sources;
  if (name !== chosen && collections.some((collection) => collection.name === name)) choose(name);
  sources = kept;
  show(location.hash.slice(1));
  say("status", "");
  if ($("query").value.trim()) search({ quiet: true });
  else $("examples").hidden = !chosen.startsWith("Python");
});

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
    moreLike(hit.dataset.row, shown.answer.lineage);
  }
});

function moreLike(row, lineage) {
  similar = { similar: Number(row), lineage };
  show("search");
  search().then(() => $("results").querySelector(".title")?.focus());
}

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
