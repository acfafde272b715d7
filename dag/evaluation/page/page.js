
/** The strips of a sheet that are shown at first. */
const FEW = 6;
const byId = (id) => document.getElementById(id);
const isLive = document.documentElement.dataset.live === "yes";
const charts = new Map(), addresses = new Map(), kept = new Map();
let state = JSON.parse(byId("state").textContent), isAll = false, isLarge = false;

/** The address of a picture. One that is inside the page is decoded once, however many strips show it. */
function addressOf(source) {
  if (!source.startsWith("data:")) return source;
  if (!addresses.has(source)) {
    const bytes = Uint8Array.from(atob(source.split(",")[1]), (letter) => letter.charCodeAt(0));
    addresses.set(source, URL.createObjectURL(new Blob([bytes], { type: "image/jpeg" })));
  }
  return addresses.get(source);
}

/** Keep a picture decoded, so that the slider does not flicker. */
function keep(picture) {
  const address = addressOf(picture.src);
  if (!kept.has(address)) kept.set(address, Object.assign(new Image(), { src: address }));
}

function image(sheets, index, picture, name) {
  const prompt = sheets.prompts[index] ?? (sheets.rows > 1 ? `prompt ${index + 1}` : "all prompts");
  return element("img", {
    src: addressOf(picture.src), class: name, draggable: "false", alt: `${prompt}, after epoch ${picture.epoch}`,
    style: `height:${100 * sheets.rows}%;top:${-100 * index}%`,
  });
}

/** Fill a grid with one strip for each prompt, the pictures of each on top of one another. */
function fill(grid, sheets, pictures) {
  const shown = isAll ? sheets.rows : Math.min(FEW, sheets.rows);
  grid.classList.toggle("large", isLarge);
  grid.replaceChildren(...Array.from({ length: shown }, (_, index) => element(
    "div", { class: "strip", style: `aspect-ratio:${sheets.ratio}` },
    ...pictures.map((picture, at) => image(sheets, index, picture, at ? "after" : "before")))));
}

function fillButtons(sheets) {
  for (const place of document.querySelectorAll(".buttons")) {
    const more = element("button", { type: "button" }, isAll ? "Fewer prompts" : `All ${sheets.rows} prompts`);
    more.addEventListener("click", () => { isAll = !isAll; drawPictures(); });
    const size = element("button", { type: "button" }, isLarge ? "Smaller pictures" : "Larger pictures");
    size.addEventListener("click", () => { isLarge = !isLarge; drawPictures(); });
    place.replaceChildren(...(sheets.rows > FEW ? [more] : []), ...(sheets.rows > 1 ? [size] : []));
  }
}

function rewarded(picture) { return picture.reward === null ? "" : `: reward ${short(picture.reward)}`; }

function named(picture) { return `epoch ${picture.epoch}${rewarded(picture)}`; }

function drawPictures() {
  const { sheets } = state, { pictures } = sheets, first = pictures[0], last = pictures.at(-1);
  byId("compare").hidden = pictures.length < 2;
  byId("epochs").hidden = pictures.length < 1;
  pictures.forEach(keep);
  fillButtons(sheets);
  if (pictures.length > 1) {
    fill(byId("compare-strips"), sheets, [first, last]);
    byId("before-label").textContent = `before${rewarded(first)}`;
    byId("after-label").textContent = `after epoch ${last.epoch}${rewarded(last)}`;
  }
  if (pictures.length) drawEpoch(true);
}

/** Show the epoch at which the slider stands. */
function drawEpoch(isNew) {
  const { sheets } = state, slider = byId("epoch"), picture = sheets.pictures[slider.valueAsNumber];
  if (isNew) fill(byId("epoch-strips"), sheets, [picture]);
  byId("epoch-strips").querySelectorAll("img").forEach((shown, index) => {
    const next = image(sheets, index, picture, "before");
    shown.src = next.src;
    shown.alt = next.alt;
  });
  byId("epoch-label").textContent = named(picture);
  slider.setAttribute("aria-valuetext", named(picture));
}

/** Set the epoch slider's range; it stays at its epoch, or at the end if it was there. */
function setRange(before, pictures) {
  const slider = byId("epoch"), at = slider.valueAsNumber, wasLast = at >= before.length - 1;
  slider.max = Math.max(0, pictures.length - 1);
  const same = pictures.findIndex((picture) => picture.epoch === before[at]?.epoch);
  slider.value = wasLast || same < 0 ? slider.max : same;
}

function drawCurves() {
  const names = new Set(state.panels.map((panel) => panel.id));
  byId("curves").hidden = !names.size;
  for (const [id, chart] of charts) if (!names.has(id)) { chart.figure.remove(); charts.delete(id); }
  for (const panel of state.panels) {
    if (charts.has(panel.id)) charts.get(panel.id).update(panel);
    else charts.set(panel.id, new Chart(panel));
  }
  // Only what is out of place is moved: to move an element takes its focus away.
  const order = state.panels.map((panel) => charts.get(panel.id).figure), place = byId("charts");
  order.forEach((figure, index) => {
    if (place.children[index] !== figure) place.insertBefore(figure, place.children[index] ?? null);
  });
}

function setCut(percent) {
  byId("cut").value = percent;
  byId("compare-strips").style.setProperty("--cut", `${percent}%`);
  byId("cut").setAttribute("aria-valuetext", `${Math.round(percent)} % before, the rest after`);
}

/** Move the divider while a pointer is dragged over a strip. */
function drag(event) {
  const strip = event.target.closest(".strip");
  if (!strip || (event.type === "pointermove" && !event.buttons)) return;
  const { left, width } = strip.getBoundingClientRect();
  setCut(Math.max(0, Math.min(100, 100 * (event.clientX - left) / width)));
}

const differ = (one, other) => JSON.stringify(one) !== JSON.stringify(other);

/** Show what has changed, and leave the rest of the page alone. */
function renew(next) {
  const old = state;
  state = next;
  for (const [id, html] of Object.entries(next.fragments)) {
    // The server has escaped everything that comes from the run.
    if (old.fragments?.[id] !== html) byId(id).innerHTML = html;
  }
  if (differ(old.panels, next.panels)) drawCurves();
  if (differ(old.sheets, next.sheets)) {
    setRange(old.sheets.pictures, next.sheets.pictures);
    drawPictures();
  }
}

async function poll() {
  const connection = byId("connection");
  try {
    const answer = await fetch("state.json", { cache: "no-store" });
    if (!answer.ok) throw new Error(await answer.text());
    renew(await answer.json());
    connection.hidden = true;
  } catch {
    connection.textContent = "The program that serves this page does not answer; this is what it said last.";
    connection.hidden = false;
  }
  setTimeout(poll, 2000);
}

byId("cut").addEventListener("input", (event) => setCut(event.target.valueAsNumber));
byId("compare-strips").addEventListener("pointerdown", drag);
byId("compare-strips").addEventListener("pointermove", drag);
byId("epoch").addEventListener("input", () => drawEpoch(false));
setCut(50);
setRange([], state.sheets.pictures);
drawPictures();
drawCurves();
if (isLive) poll();
