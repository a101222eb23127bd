// The page of a run: sends what is asked, waits in the queue, and shows what comes back. Text is only ever set as text.
"use strict";

const $ = (id) => document.getElementById(id);
const FIRST_SHOWN = 6, FIRST_RANKED = 10, MOST_LISTED = 200, LONGEST_LINK = 8000;
let about, request = 0; // of the request whose answers are still wanted
let job = null; // {id, kind, columns, rows, shown, row}
const looks = { signal: null, logo: null }; // jobs of figures that are on their way

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function decimal(value) {
  if (value === null) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

const signed = (value) => (value > 0 ? "+" : "") + decimal(value);

async function call(method, address, body) {
  const headers = body === undefined ? {} : { "Content-Type": "application/octet-stream" };
  let answer;
  try {
    answer = await fetch(address, { method, body, headers });
  } catch {
    throw Object.assign(new Error("The server does not answer. Start it again with 'seqgraft serve'."), { problems: [] });
  }
  const content = await answer.json().catch(() => ({})); // a server that is overloaded says so in plain text
  if (!answer.ok) throw Object.assign(new Error(content.message || `The server answers with error ${answer.status}. Try again later.`), { problems: content.problems || [] });
  return content;
}

// ---- asking ----

const kind = () => document.querySelector("input[name=kind]:checked").value;

function settings() {
  const query = new URLSearchParams();
  for (const box of document.querySelectorAll("#scorers input:checked")) query.append("scorers", box.value);
  if (["centre", "window"].includes($("over").value)) query.set("over", $("over").value);
  if ($("over").value === "centre" && $("width").value) query.set("width", $("width").value);
  for (const name of ["reverse_complement", "merge_strands", "stitch"]) if (!$(name).disabled) query.set(name, $(name).checked);
  return query;
}

async function ask(more = {}) {
  const own = ++request, query = about.scorers.length ? settings() : new URLSearchParams(), asked = kind();
  await drop();
  job = null;
  clear();
  try {
    let body;
    if (asked === "region") query.set("region", $("region").value.trim());
    else if (asked === "variants") body = $("variants").value;
    else {
      const file = $("file").files[0];
      if (!file) throw new Error("No file is chosen. Choose a VCF.");
      if (file.size > about.most_bytes) throw new Error(`The file has more than ${about.most_bytes.toLocaleString("en")} bytes. Split it, or use 'seqgraft variants'.`);
      body = await file.arrayBuffer();
    }
    say("Sent.");
    busy(true);
    const made = await call("POST", `/jobs?${query}`, body ?? "");
    job = { id: made.id, kind: asked === "region" ? "region" : "variants", shown: [], row: 0 };
    const state = await wait(made.id, () => own === request, (text) => say(text), (share) => progress(share));
    if (state) await show(state, more);
  } catch (error) {
    if (own === request) fail(error);
  } finally {
    if (own === request) busy(false);
  }
}

// Asks how far a job is until it is done; null if nobody wants it any more or it was cancelled.
async function wait(id, wanted, tell, share) {
  for (let pause = 100, last = ""; wanted(); pause = Math.min(pause * 1.4, 1500)) {
    const state = await call("GET", `/jobs/${id}`);
    if (!wanted()) return null;
    const first = state.before === 1 ? "1 request comes first" : `${state.before} requests come first`;
    const text = { waiting: `Waiting: ${first}.`, running: "Computing …", cancelled: "Cancelled.", failed: state.message, done: "" }[state.state];
    if (text !== last) tell((last = text));
    share(state.state === "running" ? state.progress : 0);
    if (state.state === "failed") throw Object.assign(new Error(state.message), { problems: [] });
    if (state.state === "done") return state;
    if (state.state === "cancelled") return null;
    await new Promise((resume) => setTimeout(resume, pause));
  }
  return null;
}

// Cancels what is on its way.
async function drop() {
  const ids = [...Object.values(looks).filter(Boolean), ...($("cancel").hidden || !job ? [] : [job.id])];
  looks.signal = looks.logo = null;
  await Promise.all(ids.map((id) => call("DELETE", `/jobs/${id}`).catch(() => null)));
}

function say(text) { $("status").textContent = text; }
function progress(share) { $("progress").value = share; }
function busy(yes) {
  $("progress").hidden = $("cancel").hidden = !yes;
  $("send").disabled = yes;
}

function clear() {
  $("problems").hidden = $("results").hidden = $("detail").hidden = true;
  $("problems").replaceChildren();
  $("copied").textContent = "";
  say("");
  progress(0);
}

function fail(error) {
  if (!Array.isArray(error.problems)) error.problems = [];
  say("");
  complain(error.message, error.problems);
}

function complain(title, problems) {
  const list = element("ul", {}, ...problems.map((problem) => element("li", { textContent: problem.text })));
  $("problems").replaceChildren(element("p", { className: "label", textContent: title }), ...(problems.length ? [list] : []));
  $("problems").hidden = false;
}

// ---- the answer ----

const count = (number, what) => `${number.toLocaleString("en")} ${what}${number === 1 ? "" : "s"}`;

async function show(state, more) {
  job.columns = state.columns;
  job.over = state.over || [];
  const named = (more.tracks || []).map((name) => job.columns.findIndex((column) => column.name === name)).filter((i) => i >= 0);
  job.shown = named.length ? named : job.columns.map((_, i) => i).slice(0, FIRST_SHOWN);
  job.plain = !named.length;
  $("results").hidden = false;
  $("table-part").hidden = job.kind === "region";
  $("tracks").hidden = job.columns.length < 2;
  $("find-part").hidden = job.columns.length <= 12;
  $("find").value = "";
  $("notes").replaceChildren(...(state.notes || []).map((text) => element("li", { textContent: text })));
  $("results-title").textContent = job.kind === "region" ? "Predicted signal" : "Effects";
  ticks();
  if (job.kind === "region") {
    say("Done.");
  } else {
    const problems = state.problems;
    if (problems.length) complain(`${count(problems.length, "line")} could not be scored`, problems);
    say(`Done: ${count(state.rows, "row")}${problems.length ? `, ${count(problems.length, "problem")}` : ""}.`);
    $("download").href = `/jobs/${job.id}/table.tsv`;
    await table();
  }
  address();
  const row = Math.min(Math.max(0, more.row || 0), Math.max(0, (job.rows || [0]).length - 1));
  if (job.kind === "region" || job.rows.length) await pick(row);
}

const columnQuery = (numbers) => numbers.map((number) => `column=${number}`).join("&");

async function table() {
  const found = await call("GET", `/jobs/${job.id}/table?${columnQuery(job.shown)}`);
  job.rows = found.rows;
  const several = new Set(job.rows.map((row) => row.scorer)).size > 1;
  const groups = job.rows.length ? job.rows[0].marks.map((mark) => mark.group) : [];
  const heads = ["Variant", ...job.over, ...(several ? ["Score"] : [])];
  if (job.columns.length > 1) heads.push("Most affected track", "Its score", ...groups.map((group) => `Most affected (${group})`));
  heads.push(...job.shown.map((number) => job.columns[number].name));
  const first = heads.length - job.shown.length;
  $("table").tHead.replaceChildren(element("tr", {}, ...heads.map((name, column) => {
    const head = element("th", { scope: "col" }, element("button", { type: "button", textContent: name, onclick: () => sort(column) }));
    if (column >= first || name === "Its score") head.className = "number";
    return head;
  })));
  $("table").tBodies[0].replaceChildren(...job.rows.map((row, number) => {
    const button = element("button", { type: "button", className: "pick", textContent: row.variant, onclick: () => pick(number, true) });
    const cells = [element("th", { scope: "row" }, button), ...row.over.map((name) => element("td", { textContent: name }))];
    if (several) cells.push(element("td", { textContent: row.scorer.replaceAll("_", " ") }));
    if (job.columns.length > 1) {
      cells.push(element("td", { textContent: row.top ? row.top.name : "–" }), cell(row.top ? row.top.value : null));
      for (const mark of row.marks) cells.push(element("td", { textContent: mark.name ? `${mark.name}${mark.margin === null ? "" : `, by ${decimal(mark.margin)}`}` : "–" }));
    }
    cells.push(...row.values.map(cell));
    const line = element("tr", {}, ...cells);
    line.dataset.row = number;
    return line;
  }));
  mark();
}

function cell(value) {
  const made = element("td", { className: "number", textContent: decimal(value) });
  if (value !== null) made.dataset.sort = String(value);
  return made;
}

function sort(column) {
  const heads = [...$("table").tHead.rows[0].cells], head = heads[column], body = $("table").tBodies[0];
  const down = head.getAttribute("aria-sort") !== "descending";
  for (const other of heads) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = (row) => row.cells[column].dataset.sort ?? row.cells[column].textContent;
  const order = (a, b) => {
    const [x, y] = [key(a), key(b)], empty = (x === "–") - (y === "–"); // what is not known stays below
    if (empty) return empty;
    const [p, q] = [Number(x), Number(y)], by = Number.isNaN(p) || Number.isNaN(q) ? x.localeCompare(y) : p - q;
    return down ? -by : by;
  };
  body.append(...[...body.rows].sort(order));
}

function mark() {
  for (const line of $("table").tBodies[0].rows) {
    if (Number(line.dataset.row) === job.row) line.setAttribute("aria-current", "true");
    else line.removeAttribute("aria-current");
  }
}

// ---- tracks that are shown ----

function ticks() {
  const wanted = $("find").value.trim().toLowerCase();
  const text = (column) => [column.name, column.group, column.condition].join(" ").toLowerCase();
  const found = job.columns.map((column, number) => ({ column, number })).filter(({ column }) => text(column).includes(wanted));
  $("ticks").replaceChildren(...found.slice(0, MOST_LISTED).map(({ column, number }) => {
    const box = element("input", { type: "checkbox", checked: job.shown.includes(number), value: String(number), onchange: () => tick(number, box.checked) });
    return element("label", {}, box, column.name);
  }));
  const more = found.length > MOST_LISTED ? ` Of ${found.length.toLocaleString("en")} that match, the first ${MOST_LISTED} are listed.` : "";
  $("ticks-note").textContent = `${job.shown.length} of ${job.columns.length.toLocaleString("en")} are shown.${more}`;
}

async function tick(number, yes) {
  job.shown = yes ? [...job.shown, number].sort((a, b) => a - b) : job.shown.filter((other) => other !== number);
  job.plain = false;
  $("ticks-note").textContent = `${job.shown.length} of ${job.columns.length.toLocaleString("en")} are shown.`;
  try {
    if (job.kind === "variants") await table();
    address();
    focusOptions();
    await figures("signal");
  } catch (error) {
    fail(error);
  }
}

// ---- one row, or the region ----

async function pick(row, moved = false) {
  const own = request;
  job.row = row;
  mark();
  address();
  try {
    const found = await call("GET", `/jobs/${job.id}/ranked?row=${row}`);
    if (own !== request || job.row !== row) return;
    $("detail").hidden = false;
    $("detail-title").textContent = found.title;
    const band = job.kind === "region" ? "" : " The grey band is the variant.";
    $("logo-how").textContent = `Letters are as high as what their base adds to the prediction; the colours below say what another base would do.${band}`;
    rank(found.ranked);
    focusOptions(found.ranked.length ? found.ranked[0].name : "");
    if (moved) $("detail-title").focus();
    await Promise.all([look("signal"), look("logo")]);
  } catch (error) {
    if (own === request) fail(error);
  }
}

function rank(ranked) {
  const region = job.kind === "region";
  $("ranked-title").textContent = region ? "Signal of each track, summed over the region" : "Tracks that are affected most";
  const largest = Math.max(...ranked.map((entry) => Math.abs(entry.value)), 0) || 1;
  $("more").hidden = ranked.length <= FIRST_RANKED;
  $("more").textContent = `Show all ${ranked.length}`;
  $("ranked").replaceChildren(...ranked.map((entry, number) => {
    const about = [entry.condition, entry.group].filter((text) => text && text !== entry.name).join(", ");
    const who = element("span", { className: "who", textContent: entry.name });
    if (about) who.append(" ", element("span", { className: "faint", textContent: `(${about})` }));
    const percentile = entry.percentile === null ? "" : `, percentile ${entry.percentile.toFixed(1)}`;
    const value = element("span", { className: "value", textContent: (region ? decimal(entry.value) : signed(entry.value)) + percentile });
    const length = element("span", { className: entry.value < 0 ? "down" : "" });
    length.style.width = `${(100 * Math.abs(entry.value)) / largest}%`;
    const bar = element("span", { className: "bar" }, length);
    bar.setAttribute("aria-hidden", "true");
    return element("li", { hidden: number >= FIRST_RANKED }, who, value, bar);
  }));
}

// The tracks that a logo can be drawn for: those that are shown, and the one that is affected most.
function focusOptions(top = $("focus").dataset.top || "") {
  const before = $("focus").dataset.row === String(job.row) ? $("focus").value : "";
  const numbers = [...new Set([job.columns.findIndex((column) => column.name === top), ...job.shown])].filter((number) => number >= 0);
  $("focus").replaceChildren(...numbers.map((number) => element("option", { value: String(number), textContent: job.columns[number].name })));
  if (numbers.includes(Number(before)) && before !== "") $("focus").value = before;
  Object.assign($("focus").dataset, { top, row: String(job.row) });
}

// Has the signal or the logo of the row computed, and shows it.
async function look(what) {
  const own = request, row = job.row, status = $(`${what}-status`);
  const wanted = () => own === request && job.row === row;
  $(what).replaceChildren();
  status.textContent = "";
  if (what === "signal" && job.kind === "region") {
    job.signal = job.id;
    return about.signal ? figures(what) : null;
  }
  if (!about[what]) return null;
  job[what] = null;
  if (looks[what]) call("DELETE", `/jobs/${looks[what]}`).catch(() => null);
  try {
    const name = what === "logo" ? "Logo" : "Tracks";
    const made = await call("POST", `/jobs/${job.id}/looks?what=${what}&row=${row}&column=${$("focus").value || 0}`);
    looks[what] = made.id;
    const state = await wait(made.id, wanted, (text) => { status.textContent = text && `${name}: ${text}`; }, (share) => {
      if (share > 0) status.textContent = `${name}: ${Math.round(100 * share)} % computed.`;
    });
    if (looks[what] === made.id) looks[what] = null;
    if (!state || !wanted()) return null;
    status.textContent = `${name}: drawing …`;
    job[what] = made.id;
    await figures(what);
    if (wanted()) status.textContent = "";
    return null;
  } catch (error) {
    if (wanted()) status.textContent = error.message;
    return null;
  }
}

async function figures(what) {
  const id = job[what], row = job.row, own = request;
  const columns = what === "logo" ? [Number($("focus").value || 0)] : job.shown;
  if (!id) return;
  if (!columns.length) {
    $(what).replaceChildren(element("p", { className: "caption", textContent: "No track is chosen." }));
    return;
  }
  const found = await call("GET", `/jobs/${id}/figures?${columnQuery(columns.slice(0, MOST_LISTED))}`);
  if (own !== request || job.row !== row) return;
  const drawn = found.figures.map((svg) => {
    const figure = element("figure");
    figure.tabIndex = 0; // it scrolls where the screen is narrow
    figure.innerHTML = svg; // drawn by the server, in which every name is text
    figure.setAttribute("aria-label", figure.firstElementChild.getAttribute("aria-label"));
    return figure;
  });
  const { ref, alt } = job.kind === "region" ? { ref: "", alt: "" } : job.rows[row];
  if (what === "signal" && ref.length !== alt.length) drawn.push(element("p", { className: "caption", textContent: "Inserted bases count in the bin of the variant; bins of deleted ones are 0. What lies right of it stands beside its reference." }));
  if (what === "signal" && columns.length > 12) drawn.push(element("p", { className: "caption", textContent: "The first 12 of the tracks shown." }));
  $(what).replaceChildren(...drawn);
}

// ---- the address holds the request ----

function link() {
  const query = about.scorers.length ? settings() : new URLSearchParams();
  const usual = about.chosen; // what the server was started with is left out
  if (query.getAll("scorers").join() === usual.scorers.join()) query.delete("scorers");
  for (const [name, value] of [...query]) if (name !== "scorers" && String(usual[name]) === value) query.delete(name);
  if (job.kind === "region") query.set("region", $("region").value.trim());
  else query.set("variants", kind() === "variants" ? $("variants").value : written());
  if (!job.plain) for (const number of job.shown) query.append("track", job.columns[number].name);
  if (job.row) query.set("row", job.row);
  return `#${query}`;
}

const written = () => [...new Set(job.rows.map((row) => [row.chrom, row.position, row.ref, row.alt].join("-")))].join("\n");

function address() {
  const hash = link(), fits = hash.length <= LONGEST_LINK;
  $("copy").disabled = !fits;
  $("copied").textContent = fits ? "" : "There are too many variants for a link.";
  history.replaceState(null, "", fits ? hash : "#");
}

function read() {
  const query = new URLSearchParams(location.hash.slice(1));
  if (!query.has("variants") && !query.has("region")) return false;
  const region = query.has("region");
  document.querySelector(`input[name=kind][value=${region ? "region" : "variants"}]`).checked = true;
  $(region ? "region" : "variants").value = query.get(region ? "region" : "variants");
  if (query.has("scorers")) for (const box of document.querySelectorAll("#scorers input")) box.checked = query.getAll("scorers").includes(box.value);
  if (query.has("over")) $("over").value = query.get("over");
  if (query.has("width")) $("width").value = query.get("width");
  for (const name of ["reverse_complement", "merge_strands", "stitch"]) if (query.has(name)) $(name).checked = query.get(name) === "true";
  choose();
  ask({ tracks: query.getAll("track"), row: Number(query.get("row")) || 0 });
  return true;
}

// ---- the form ----

function choose() {
  for (const name of ["variants", "file", "region"]) $(`ask-${name}`).hidden = kind() !== name;
  $("send").textContent = kind() === "region" ? "Show the region" : "Show the effects";
  $("width-part").hidden = $("over").value !== "centre";
}

function fill() {
  const chosen = about.chosen, example = about.chroms[0] || "chr1", many = about.most_variants.toLocaleString("en");
  const others = about.replicates ? ` and ${count(about.replicates, "replicate")}` : "";
  document.title = `${about.name}: variant effects`;
  $("title").textContent = `What do variants change in ${about.name}?`;
  $("facts").textContent = `${about.label} on ${about.model}${others}: ${about.predicts}, ${count(about.tracks, "track")}. Genome: ${about.genome} (${about.chroms.join(", ")}${about.more_chroms ? `, and ${about.more_chroms} more` : ""}).`;
  $("cannot").textContent = about.cannot.join(" ");
  $("cannot").hidden = !about.cannot.length;
  $("variants").placeholder = `${example}-1000-A-G`;
  $("variants-how").textContent = `As ${example}-1000-A-G, ${example}:1000:A>G or rows of a VCF; positions count from 1. At most ${many}.`;
  $("file-how").textContent = `At most ${many} variants and ${(about.most_bytes / 1e6).toLocaleString("en")} MB. Genotypes are not read.`;
  $("region-how").textContent = `As ${example}:1,001-2,000: positions count from 1, both ends are included. At most ${about.target.toLocaleString("en")} bp.`;
  $("region-kind").hidden = !about.logo;
  $("settings").hidden = !about.scorers.length;
  $("logo-part").hidden = !about.logo;
  $("scorers").append(...about.scorers.map((name) => element("label", {}, element("input", { type: "checkbox", value: name, checked: chosen.scorers.includes(name) }), name.replaceAll("_", " "))));
  const words = { centre: "the bins around the variant", window: "the whole window" };
  $("over").append(...about.overs.map((name) => element("option", { value: name, textContent: words[name] || `${name}, as the server was started` })));
  $("over-part").hidden = !about.overs.length;
  $("over").value = chosen.over;
  $("width").value = chosen.width || 501;
  $("merge-part").hidden = !about.stranded;
  $("stitch-part").hidden = !about.signal;
  for (const name of ["reverse_complement", "merge_strands", "stitch"]) $(name).checked = chosen[name];
  choose();
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
$("form").addEventListener("change", choose);
$("cancel").addEventListener("click", async () => {
  const dropped = drop();
  request += 1; // nobody waits for it any more
  await dropped;
  busy(false);
  say("Cancelled.");
});
$("more").addEventListener("click", () => {
  for (const item of $("ranked").children) item.hidden = false;
  $("more").hidden = true;
});
$("find").addEventListener("input", ticks);
$("focus").addEventListener("change", () => (job.kind === "region" ? look("logo") : figures("logo")).catch(fail));
$("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(location.href);
    $("copied").textContent = "Copied.";
  } catch {
    $("copied").textContent = "The browser does not allow it; copy the address of this page instead.";
  }
});
addEventListener("hashchange", read);

call("GET", "/about").then((facts) => { about = facts; fill(); read(); }, fail);
