// Elements. All text goes in as text, never as markup.

let nIds = 0;

/** A new id, for labels. */
export function newId() {
  nIds += 1;
  return `auto-circuit-${nIds}`;
}

/** An element; children are elements or texts, null is left out. */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null));
  return element;
}

/** Puts children in the place of what an element holds. */
export function fill(element, ...children) {
  element.replaceChildren(...children.flat().filter((child) => child !== null));
}

/** A labelled select. options: [value, text]. */
export function select(label, options, onchange) {
  const id = newId();
  const input = el("select", { id, onchange: () => onchange(input.value) });
  setOptions(input, options);
  const field = el("div", { class: "ace-field" }, el("label", { for: id }, label), input);
  return { field, input };
}

export function setOptions(input, options) {
  fill(input, options.map(([value, text]) => el("option", { value }, text)));
}

/** A text on one line, short enough for a place. */
export function short(text, length = 24) {
  const line = text.replace(/\s+/g, " ");
  const letters = [...line];
  return letters.length > length ? `${letters.slice(0, length - 1).join("")}…` : line;
}

/** A token as it is shown: spaces and line ends are visible. */
export function tokenText(token) {
  const text = token.replace(/\n/g, "⏎").replace(/\t/g, "⇥");
  return text.trim() === "" ? text.replace(/ /g, "␣") || "∅" : text;
}
