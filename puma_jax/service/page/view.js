// What a result looks like, in the grid and on its own.

import { imageUrl } from "./api.js";

const KINDS = { image: "Picture", text: "Text", "image,text": "Picture with text" };
const template = document.querySelector("#card");
const detail = document.querySelector("#detail");

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** Return an image that appears once it is there, or says that it is gone. */
function picture(path, alt, width) {
  const image = element("img");
  image.alt = alt;
  image.loading = "lazy";
  image.decoding = "async";
  image.onload = () => image.classList.add("there");
  image.onerror = () => {
    const gone = element("span", "", "The picture cannot be shown");
    image.parentElement?.classList.add("gone");
    image.replaceWith(gone);
  };
  imageUrl(width ? `${path}?width=${width}` : path).then(
    (url) => (image.src = url),
    () => image.onerror(),
  );
  return image;
}

const named = (hit) => hit.text || hit.id;

/** Return the card of a result. */
export function card(hit, actions) {
  const item = template.content.firstElementChild.cloneNode(true);
  const open = item.querySelector(".open");
  item.classList.add(hit.image ? "pictured" : "text");
  if (hit.image) {
    const frame = element("span", "picture");
    frame.append(picture(hit.image, hit.text ? "" : hit.id, 512));
    open.append(frame);
  }
  if (hit.text) open.append(element("span", "words", hit.text));
  open.title = named(hit).slice(0, 300);
  open.onclick = () => actions.open(hit);
  item.querySelector(".score").textContent = hit.score.toFixed(3);
  item.querySelector(".score").title = "Inner product of the unit vectors of query and document";
  const like = item.querySelector(".like");
  like.setAttribute("aria-label", `More like ${named(hit).slice(0, 80)}`);
  like.onclick = () => actions.like(hit);
  return item;
}

function rows(hit) {
  const all = [["Score", hit.score.toFixed(4)], ["Kind", KINDS[hit.modality]], ["Id", hit.id]];
  for (const [name, value] of Object.entries(hit.fields)) {
    all.push([name, Array.isArray(value) ? value.join(", ") : String(value)]);
  }
  return all.flatMap(([name, value]) => [element("dt", "", name), element("dd", "", value)]);
}

/** Show a result on its own, with all that is known of it. */
export function showDetail(hit, actions) {
  detail.className = hit.image ? "pictured" : "text";
  const frame = detail.querySelector(".detail-picture");
  frame.classList.remove("gone");
  frame.replaceChildren(...(hit.image ? [picture(hit.image, named(hit))] : []));
  const words = detail.querySelector(".words");
  words.textContent = hit.text ?? "";
  words.hidden = !hit.text;
  detail.querySelector("dl").replaceChildren(...rows(hit));
  detail.querySelector(".like").onclick = () => {
    detail.close();
    actions.like(hit);
  };
  detail.showModal();
}

detail.querySelector(".close").onclick = () => detail.close();
detail.onclick = (event) => {
  if (event.target === detail) detail.close();
};

/** Move the focus among cards with the arrow keys. */
export function moveAmong(list, event) {
  const cards = [...list.querySelectorAll(".open")];
  const here = cards.indexOf(document.activeElement);
  if (here < 0) return;
  const columns = getComputedStyle(list).gridTemplateColumns.split(" ").length;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
  const next = cards[here + step];
  if (step && next) {
    event.preventDefault();
    next.focus();
  }
}
