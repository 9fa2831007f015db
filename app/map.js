// The map: drawn at once by principal components, then again when the server has the map of neighbours.

const LIGHT = ["#33669a", "#3d7a35", "#b35c00", "#7d4f78", "#2f7f7a", "#8a6d00", "#6d4f3c", "#b0455a", "#8b939c"];
const DARK = ["#7fb2e5", "#86cf7b", "#ffb066", "#d3a5cd", "#7fd3cd", "#e6cd55", "#c7a68f", "#ff9daf", "#77808a"];
const MARGIN = 14, REACH = 14, MAX_ZOOM = 60, MOVE_MS = 700;
let map = null; // the server's last answer, with what it answers and `units`: places from 0 to 1, by row
let mapped = 0, mapTimer;
let camera = { zoom: 1, x: 0, y: 0 }; // magnification, and the middle's distance from the canvas's in pixels
let pointed = null; // the point under the pointer, or that of the arrow keys
const beginnings = new Map(); // of texts, by their row, for the points that were pointed to

async function drawMap() {
  clearTimeout(mapTimer);
  if ($("view-map").hidden) return;
  const number = (mapped += 1);
  if (!collections.length) {
    say("map-status", "The first passages are being indexed.");
    mapTimer = setTimeout(drawMap, 2000);
    return;
  }
  const { similar: _, ...data } = shown?.data.collection === chosen ? shown.data : { collection: chosen };
  if (data.query !== undefined) Object.assign(data, { rows: shown.answer.rows, lineage: shown.answer.lineage });
  const key = JSON.stringify(data), isSame = map?.key === key;
  if (!isSame) say("map-status", "Drawing…");
  let answer;
  try {
    answer = await call("map", { ...data, sources: [], version: isSame ? map.version : "" });
  } catch (error) {
    if (number === mapped) {
      if (map?.collection !== chosen) forgetMap();
      say("map-status", error.message, true);
    }
    return;
  }
  if (number !== mapped) return;
  if (answer.points) {
    const old = map?.collection === chosen ? map.units : null;
    if (!old) forgetMap();
    map = { ...answer, key, collection: chosen, units: units(answer) };
    beginnings.clear();
    pointed = null;
    showLegend();
    move(old);
  } else Object.assign(map, answer);
  say("map-status", mapLine(answer));
  if (answer.progress !== null) mapTimer = setTimeout(drawMap, 1000);
}

function forgetMap() {
  map = pointed = null;
  camera = { zoom: 1, x: 0, y: 0 };
  $("legend").replaceChildren();
  $("point").replaceChildren();
  $("tip").textContent = "";
  $("plane").getContext("2d").clearRect(0, 0, $("plane").width, $("plane").height);
}

function mapLine({ total, progress, note }) {
  const sample = map.points.length < total ? `${map.points.length.toLocaleString("en")} of ` : "";
  const line = `${sample}${total.toLocaleString("en")} ${total === 1 ? "passage" : "passages"} of ${chosen}`;
  if (progress !== null) return `${line}, by principal components; the map of neighbours is being made: ${Math.round(100 * progress)} %`;
  if (map.version.endsWith("neighbours")) return `${line}: neighbours in meaning are neighbours here`;
  return `${line}, by principal components${note ? `: ${note}` : ""}`;
}

// Places from 0 to 1 of each row, and of the query as row -1, with the same scale in both directions.
function units({ points, query }) {
  const all = query ? [...points, [...query, 0, -1]] : points;
  const ranges = [0, 1].map((axis) =>
    all.reduce(([low, high], point) => [Math.min(low, point[axis]), Math.max(high, point[axis])], [Infinity, -Infinity]),
  );
  const span = Math.max(...ranges.map(([low, high]) => high - low)) || 1;
  const [middleX, middleY] = ranges.map(([low, high]) => (low + high) / 2);
  return new Map(all.map(([x, y, , row]) => [row, [0.5 + (x - middleX) / span, 0.5 - (y - middleY) / span]]));
}

// Moves each point from its old place, if it had one, to the new one.
function move(old) {
  const target = map.units, started = performance.now(), version = map.version;
  if (!old || matchMedia("(prefers-reduced-motion: reduce)").matches) return paint();
  const frame = (now) => {
    if (map?.version !== version) return;
    const part = Math.min(1, Math.max(0, (now - started) / MOVE_MS)), eased = part * part * (3 - 2 * part);
    map.units = new Map(
      [...target].map(([row, [x, y]]) => {
        const [fromX, fromY] = old.get(row) || [x, y];
        return [row, [fromX + (x - fromX) * eased, fromY + (y - fromY) * eased]];
      }),
    );
    if (part === 1) map.units = target;
    paint();
    if (part < 1) requestAnimationFrame(frame);
  };
  requestAnimationFrame(frame);
}

function at(row) {
  const { clientWidth: width, clientHeight: height } = $("plane");
  const size = (Math.min(width, height) - 2 * MARGIN) * camera.zoom;
  const stretch = Math.min(1.8, (width - 2 * MARGIN) / (height - 2 * MARGIN)); // a wide window is used
  const [x, y] = map.units.get(row);
  return [width / 2 + camera.x + (x - 0.5) * size * Math.max(1, stretch), height / 2 + camera.y + (y - 0.5) * size];
}

function colours() {
  return element.closest(".dark") ? DARK : LIGHT;
}

function showLegend() {
  const hasOthers = map.points.some((point) => point[2] >= map.sources.length);
  $("legend").replaceChildren(
    ...[...map.sources, ...(hasOthers ? ["others"] : [])].map((name, index) => {
      const item = document.createElement("li"), dot = document.createElement("i");
      dot.style.background = colours()[index < map.sources.length ? index : 8];
      item.append(dot, name);
      return item;
    }),
  );
}

function paint() {
  if (!map || $("view-map").hidden) return;
  const canvas = $("plane"), context = canvas.getContext("2d"), scale = window.devicePixelRatio || 1;
  const { clientWidth: width, clientHeight: height } = canvas;
  canvas.width = width * scale;
  canvas.height = height * scale;
  context.setTransform(scale, 0, 0, scale, 0, 0);
  const palette = colours(), style = getComputedStyle(canvas), size = Math.min(7, 2.6 + camera.zoom / 3);
  context.globalAlpha = 0.75;
  for (const point of map.points) {
    const [x, y] = at(point[3]);
    context.fillStyle = palette[point[2] < map.sources.length ? point[2] : 8];
    context.fillRect(x - size / 2, y - size / 2, size, size);
  }
  context.globalAlpha = 1;
  context.strokeStyle = style.color;
  context.lineWidth = 2;
  context.font = `600 11px ${style.fontFamily}`;
  const ring = (row, radius) => {
    const [x, y] = at(row);
    context.beginPath();
    context.arc(x, y, radius, 0, 7);
    context.stroke();
    return [x, y];
  };
  for (const [index, row] of map.hits.entries()) {
    const [x, y] = ring(row, 6);
    context.lineWidth = 3;
    context.strokeStyle = style.backgroundColor;
    context.fillStyle = style.color;
    context.strokeText(String(index + 1), x + 8, y - 5);
    context.fillText(String(index + 1), x + 8, y - 5);
    context.lineWidth = 2;
    context.strokeStyle = style.color;
  }
  if (pointed) ring(pointed[3], 9);
  if (map.query) {
    const [x, y] = at(-1);
    context.beginPath();
    for (const [dx, dy] of [[8, 8], [8, -8]]) {
      context.moveTo(x - dx, y - dy);
      context.lineTo(x + dx, y + dy);
    }
    context.stroke();
  }
}

function nearest(event) {
  if (!map) return null;
  const box = $("plane").getBoundingClientRect();
  let best = null, distance = REACH;
  for (const point of map.points) {
    const [x, y] = at(point[3]);
    const away = Math.hypot(x - (event.clientX - box.left), y - (event.clientY - box.top));
    if (away < distance) [best, distance] = [point, away];
  }
  return best;
}

async function pointTo(point) {
  if (point === pointed) return;
  pointed = point;
  paint();
  const tip = $("tip");
  if (!point) return (tip.textContent = "");
  const [, , , row, title] = point, [x, y] = at(row), title_ = document.createElement("b"), text = document.createElement("span");
  title_.textContent = title;
  title_.dir = text.dir = "auto";
  text.textContent = beginnings.get(row) || "";
  tip.replaceChildren(title_, text);
  const width = $("plane").clientWidth;
  tip.style.left = `${Math.max(0, Math.min(x + 12, width - tip.offsetWidth - 4))}px`;
  tip.style.top = `${y + 14}px`;
  if (text.textContent) return;
  await new Promise((done) => setTimeout(done, 80)); // the pointer passes over many
  if (pointed !== point) return;
  try {
    const { html } = await call("passage", { collection: map.collection, row, lineage: map.lineage });
    const read = document.createElement("template");
    read.innerHTML = html;
    for (const line of read.content.querySelectorAll("code")) line.append(" ");
    beginnings.set(row, read.content.querySelector(".text").textContent.slice(0, 160));
    if (pointed === point) text.textContent = beginnings.get(row);
  } catch {
    // its title is there; opening it says what is wrong
  }
}

async function openPoint(point) {
  if (!point) return;
  try {
    const { html } = await call("passage", { collection: map.collection, row: point[3], lineage: map.lineage });
    $("point").innerHTML = html;
    const heading = $("point").querySelector("h3");
    heading.tabIndex = -1;
    heading.focus({ preventScroll: true });
    $("point").scrollIntoView({ block: "nearest" });
  } catch (error) {
    say("map-status", error.message, true);
  }
}
$("point").addEventListener("click", (event) => {
  if (event.target.matches(".similar")) moreLike(event.target.closest(".hit").dataset.row, map.lineage);
});

// Magnifies around a place of the canvas, by default its middle.
function zoom(factor, [x, y] = [$("plane").clientWidth / 2, $("plane").clientHeight / 2]) {
  const to = Math.min(MAX_ZOOM, Math.max(1, camera.zoom * factor)), ratio = to / camera.zoom;
  const dx = x - $("plane").clientWidth / 2, dy = y - $("plane").clientHeight / 2;
  camera = to === 1 ? { zoom: 1, x: 0, y: 0 } : { zoom: to, x: dx - (dx - camera.x) * ratio, y: dy - (dy - camera.y) * ratio };
  $("tip").textContent = "";
  paint();
}
$("zoom-in").addEventListener("click", () => zoom(1.6));
$("zoom-out").addEventListener("click", () => zoom(1 / 1.6));
$("zoom-reset").addEventListener("click", () => zoom(0));
let dragged = null;
$("plane").addEventListener("wheel", (event) => {
  if (!event.ctrlKey && document.activeElement !== $("plane")) return; // the page scrolls
  event.preventDefault();
  zoom(event.deltaY < 0 ? 1.25 : 0.8, [event.offsetX, event.offsetY]);
}, { passive: false });
$("plane").addEventListener("pointerdown", (event) => {
  dragged = { x: event.clientX, y: event.clientY, camera, isMoved: false };
});
$("plane").addEventListener("pointermove", (event) => {
  if (dragged && event.buttons && event.pointerType === "mouse") {
    const dx = event.clientX - dragged.x, dy = event.clientY - dragged.y;
    if (Math.hypot(dx, dy) > 4) dragged.isMoved = true;
    if (!dragged.isMoved) return;
    camera = { ...dragged.camera, x: dragged.camera.x + dx, y: dragged.camera.y + dy };
    $("tip").textContent = "";
    paint();
  } else if (event.pointerType === "mouse") pointTo(nearest(event));
});
$("plane").addEventListener("pointerleave", () => pointTo(null));
$("plane").addEventListener("click", (event) => {
  if (!dragged?.isMoved) openPoint(nearest(event));
  dragged = null;
});
$("plane").addEventListener("keydown", (event) => {
  if (!map || event.ctrlKey || event.metaKey || event.altKey) return;
  const directions = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  if (event.key in directions) pointTo(beside(directions[event.key]));
  else if (event.key === "Enter") openPoint(pointed);
  else if (event.key === "+" || event.key === "=") zoom(1.6);
  else if (event.key === "-") zoom(1 / 1.6);
  else if (event.key === "0" || event.key === "Escape") zoom(0);
  else return;
  event.preventDefault();
});

// The nearest point in a direction from the one that is pointed to; at first the best result, or any point.
function beside([dx, dy]) {
  const first = map.points.find((point) => point[3] === map.hits[0]) || map.points[0];
  if (!pointed || !map.units.has(pointed[3])) return first;
  const [fromX, fromY] = at(pointed[3]);
  let best = pointed, smallest = Infinity;
  for (const point of map.points) {
    const [x, y] = at(point[3]), ahead = (x - fromX) * dx + (y - fromY) * dy;
    const aside = Math.abs((x - fromX) * dy) + Math.abs((y - fromY) * dx);
    if (ahead > 1 && ahead + 2 * aside < smallest) [best, smallest] = [point, ahead + 2 * aside];
  }
  return best;
}
window.addEventListener("resize", paint);
