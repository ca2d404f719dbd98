// In a page: every element that holds an explorer's data becomes one. In a notebook:
// anywidget calls `render`.

import css from "./style.css";
import { Explorer } from "./explorer.js";
import { el } from "./dom.js";
import { unpacked } from "./packed.js";

const HOLDER = "[data-auto-circuit-explorer]";
const DATA = 'script[type="text/plain"]';
const TOO_OLD =
  "This browser is too old for the explorer, which needs DecompressionStream (2023 or later).";

/** Show the explorer in an element. text: what Python's `packed` gave. */
export async function mount(element, text) {
  if (typeof DecompressionStream === "undefined") {
    element.prepend(el("p", {}, TOO_OLD)); // the picture stays
    return { destroy: () => element.replaceChildren() };
  }
  return show(element, await unpacked(text));
}

/** data: {tasks: [a task's view, ...]}. */
function show(element, data) {
  if (!document.getElementById("auto-circuit-style")) {
    document.head.append(el("style", { id: "auto-circuit-style" }, css));
  }
  const tasks = data.tasks.filter((task) => task.algorithms.some((one) => one.sizes.length));
  if (!tasks.length) {
    element.replaceChildren(el("p", {}, "There is no circuit to explore yet."));
    return { destroy: () => element.replaceChildren() };
  }
  element.classList.add("auto-circuit-explorer");
  const root = el("div", { class: "ace-root" });
  element.replaceChildren(root);
  element.explorer = new Explorer(root, { tasks });
  return element.explorer;
}

function mountAll() {
  for (const element of document.querySelectorAll(HOLDER)) {
    const script = element.querySelector(DATA);
    if (script) mount(element, script.textContent);
  }
}

if (typeof document !== "undefined") {
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", mountAll);
  else mountAll();
}

/** What anywidget calls. */
async function render({ model, el: element }) {
  // The notebook's own shortcuts would take arrow keys and letters: JupyterLab leaves out
  // what is marked so, others do not see keys that end here.
  element.dataset.lmSuppressShortcuts = "true";
  element.addEventListener("keydown", (event) => event.stopPropagation());
  const holder = document.createElement("div");
  element.append(holder);
  const explorer = await mount(holder, model.get("data"));
  return () => explorer.destroy();
}

export default { render };
