// The page: what is asked lives in the URL, and what is found is drawn from the answer.

import { ServiceError, about, imageUrl, key, search } from "./api.js";
import { card, moveAmong, showDetail } from "./view.js";

const $ = (selector) => document.querySelector(selector);
const form = $("#search");
const chip = $("#query-picture");
const results = $("#results");
const status = $("#status");
const notice = $("#notice");

const settings = { k: 24, instruction: "", maxK: 200 };
// A picture, or the document whose like is wanted; never both.
let picture = null;
let like = null;
// The picture as the history keeps it: browsers drop files from there, but not their bytes.
let kept = null;
const KEPT_BYTES = 8_000_000;
let running = null;

/** Return what the controls ask for. */
function asked() {
  return {
    text: $("#text").value.trim(),
    modality: new FormData(form).get("modality"),
    instruction: $("#instruction").value.trim(),
    filter: $("#filter").value.trim(),
    k: Math.min(Math.max(1, Math.round(Number($("#k").value)) || settings.k), settings.maxK),
  };
}

/** Return the address of what is asked. Settings that are those of the service are left out. */
function address() {
  const query = asked();
  const parameters = new URLSearchParams();
  if (like) parameters.set("like", like.id);
  else if (query.text) parameters.set("q", query.text);
  if (picture) parameters.set("picture", picture.name || "pasted");
  for (const name of ["modality", "filter"]) if (query[name]) parameters.set(name, query[name]);
  if (query.instruction !== settings.instruction) parameters.set("instruction", query.instruction);
  if (query.k !== settings.k) parameters.set("k", query.k);
  const said = parameters.toString();
  return said ? `/?${said}` : "/";
}

/** Set the controls to an address, and to what the browser has kept with it. */
function restore() {
  const parameters = new URLSearchParams(location.search);
  const state = history.state ?? {};
  kept = state.kept ?? null;
  picture = kept && new File([kept.bytes], kept.name, { type: kept.type });
  const identifier = parameters.get("like");
  const unknown = { id: identifier, image: `/images/${encodeURIComponent(identifier)}` };
  like = identifier === null ? null : (state.like ?? unknown);
  $("#text").value = parameters.get("q") ?? "";
  const modality = parameters.get("modality") ?? "";
  for (const input of form.elements.modality) input.checked = input.value === modality;
  $("#instruction").value = parameters.get("instruction") ?? settings.instruction;
  $("#filter").value = parameters.get("filter") ?? "";
  $("#k").value = parameters.get("k") ?? settings.k;
  showChip();
  showOptionsUsed();
  const lost = parameters.get("picture");
  if (lost && !picture) {
    begin();
    say(`This search had a picture, “${lost}”, which a link cannot carry. Add it again.`, true);
  } else if (like || picture || $("#text").value) {
    run();
  } else {
    begin();
  }
}

/** Show the page as it is before the first search. */
function begin() {
  running?.abort();
  document.body.classList.add("start");
  document.title = "Search · puma_jax";
  results.replaceChildren();
  status.textContent = "";
  say("");
}

function say(message, mild = false) {
  notice.hidden = !message;
  notice.classList.toggle("mild", mild);
  notice.querySelector("p").textContent = message;
  $("#key-form").hidden = true;
}

function showOptionsUsed() {
  const query = asked();
  const used = [
    query.filter,
    query.instruction !== settings.instruction,
    query.k !== settings.k,
  ].filter(Boolean).length;
  $("#more b").textContent = used;
  $("#more b").hidden = !used;
  $("#more").classList.toggle("used", used > 0);
}

/** Show the picture of the query, or the document whose like is wanted. */
async function showChip() {
  chip.hidden = !picture && !like;
  chip.classList.toggle("like", Boolean(like));
  chip.querySelector(".remove").setAttribute(
    "aria-label",
    like ? "Search for something else" : "Remove the picture",
  );
  $("#text").placeholder = like
    ? `More like ${(like.text || like.id).slice(0, 60)}`
    : picture
      ? "Add words, if you like"
      : "Describe what to find";
  const image = chip.querySelector("img");
  const tile = chip.querySelector(".tile");
  const hasImage = Boolean(picture || like?.image);
  image.hidden = !hasImage;
  tile.hidden = hasImage;
  if (chip.hidden || !hasImage) return;
  // A document that only a link has named may be a text.
  image.onerror = () => {
    image.hidden = true;
    tile.hidden = false;
  };
  image.alt = like ? `Like ${like.text || like.id}` : "Picture of the query";
  const thumbnail = () => imageUrl(`${like.image}?width=128`).catch(() => "");
  image.src = picture ? URL.createObjectURL(picture) : await thumbnail();
}

/** Ask for what the controls say; a new place in the history unless it is the same one. */
function go() {
  const state = { kept, like };
  if (address() === location.pathname + location.search) history.replaceState(state, "");
  else history.pushState(state, "", address());
  showOptionsUsed();
  run();
}

async function run() {
  const query = asked();
  if (!query.text && !picture && !like) {
    begin();
    $("#text").focus();
    return;
  }
  running?.abort();
  const mine = (running = new AbortController());
  document.body.classList.remove("start");
  document.body.classList.add("busy");
  say("");
  const { text, modality, instruction, filter, k } = query;
  const wanted = { k, modality: modality || null, filter: filter || null };
  if (like) wanted.id = like.id;
  else Object.assign(wanted, { text: text || null, instruction, picture });
  const start = performance.now();
  try {
    const answer = await search(wanted, mine.signal);
    show(answer, performance.now() - start, query);
  } catch (error) {
    if (error.name === "AbortError") return;
    fail(error);
  }
  if (running === mine) document.body.classList.remove("busy");
}

function show(answer, took, query) {
  const found = answer.hits.length;
  results.replaceChildren(...answer.hits.map((hit) => card(hit, actions)));
  status.classList.toggle("empty", !found);
  document.title = `${query.text || (like ? `Like ${like.text || like.id}` : "By picture")} · puma_jax`;
  if (!found) {
    const limits = [query.filter && "the filter", query.modality && "the kind of document"];
    const what = limits.filter(Boolean).join(" and ");
    const heading = document.createElement("strong");
    heading.textContent = "Nothing found";
    status.replaceChildren(heading, what ? `No document passes ${what}.` : "The index is empty.");
  } else {
    const { encode, search: searched } = answer.took_ms;
    const parts = [
      `${found.toLocaleString()} ${found === 1 ? "result" : "results"} in ${Math.round(took)} ms`,
      `model ${Math.round(encode)} ms`,
      `search ${Math.round(searched)} ms`,
    ];
    status.textContent = parts.join(" · ");
  }
  if (answer.warnings.length) say(`Note: ${answer.warnings.join("; ")}.`, true);
}

function fail(error) {
  results.replaceChildren();
  status.classList.remove("empty");
  status.textContent = "";
  if (!(error instanceof ServiceError)) throw error;
  if (error.status === 401) {
    say(key.get() ? "The service did not accept this key." : "This service asks for a key.", true);
    $("#key-form").hidden = false;
    $("#key").focus();
    return;
  }
  say(error.message);
}

const actions = {
  open: (hit) => showDetail(hit, actions),
  like: (hit) => {
    picture = kept = null;
    like = { id: hit.id, image: hit.image, text: hit.text };
    $("#text").value = "";
    showChip();
    go();
    scrollTo({ top: 0 });
  },
};

/** Search with a picture, from wherever it comes. */
async function take(file) {
  if (!file) return;
  if (!file.type.startsWith("image/")) {
    say(`“${file.name}” is not a picture.`);
    return;
  }
  const { name, type } = file;
  kept = file.size <= KEPT_BYTES ? { name, type, bytes: await file.arrayBuffer() } : null;
  picture = file;
  like = null;
  showChip();
  go();
}

form.onsubmit = (event) => {
  event.preventDefault();
  if ($("#text").value.trim() && like) {
    like = null;
    showChip();
  }
  go();
};
form.onchange = (event) => {
  if (event.target.name === "modality") go();
  showOptionsUsed();
};
$("#more").onclick = () => {
  const options = $("#options");
  options.hidden = !options.hidden;
  $("#more").setAttribute("aria-expanded", String(!options.hidden));
};
$("#choose").onclick = () => $("#file").click();
$("#file").onchange = () => {
  take($("#file").files[0]);
  $("#file").value = "";
};
chip.querySelector(".remove").onclick = () => {
  picture = kept = like = null;
  showChip();
  go();
  $("#text").focus();
};
$("#key-form").onsubmit = (event) => {
  event.preventDefault();
  key.set($("#key").value.trim());
  $("#key").value = "";
  open();
};
$(".home").onclick = (event) => {
  event.preventDefault();
  history.pushState({}, "", "/");
  restore();
  $("#text").focus();
};
results.onkeydown = (event) => moveAmong(results, event);

let over = 0;
const holdsFile = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
addEventListener("dragenter", (event) => {
  if (holdsFile(event)) $("#drop").hidden = ++over === 0;
});
addEventListener("dragleave", (event) => {
  if (holdsFile(event)) $("#drop").hidden = --over <= 0;
});
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  over = 0;
  $("#drop").hidden = true;
  take(event.dataTransfer.files[0]);
});
addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
  if (!file) return;
  event.preventDefault();
  take(file);
});
addEventListener("keydown", (event) => {
  const typing = event.target.matches?.("input");
  if (event.key === "/" && !typing && !$("#detail").open) {
    event.preventDefault();
    $("#text").select();
    $("#text").focus();
  }
});
addEventListener("popstate", restore);

/** Ask what the index is, then show what the address asks for. */
async function open() {
  try {
    const index = await about();
    settings.instruction = index.instruction ?? "";
    settings.maxK = index.max_k;
    settings.k = Math.min(settings.k, index.max_k);
    $("#k").max = index.max_k;
    const count = `${index.documents.toLocaleString()} documents`;
    $("#about").textContent = `${count} · ${index.model}`;
    restore();
    $("#text").focus({ preventScroll: true });
  } catch (error) {
    fail(error);
  }
}

open();
