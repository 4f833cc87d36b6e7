// Texts of this pack's nodes: where they go, what colour they have, and how old they are.
//
// The server names the node and the workflow of the prompt that runs.  A text for a workflow that is
// not open waits until it is.  Nothing here is saved with a workflow.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const WIDGET = "sage_text";
const COLOURS = { nothing: "#ff5555", failed: "#ff5555", warning: "#ffb347", cancelled: "#ffb347" };
const BYPASSED = { state: "off", text: "bypassed: it did nothing in this run" };
const MUTED = { state: "off", text: "muted: it did not run" };

/** What the server says -> the page's language; what is not listed stays English. */
let words = [];
fetch(new URL("./words.json", import.meta.url))
  .then((answer) => answer.json())
  .then((list) => {
    words = list.map((one) => ({ ...one, pattern: new RegExp(`^${one.en}$`) }));
  });

function translated(line) {
  const language = app.extensionManager?.setting?.get("Comfy.Locale");
  for (const word of language === "en" ? [] : words) {
    const found = word[language] && line.match(word.pattern);
    // A part may be a sentence of its own: a cause after "NOT QUANTIZED".
    if (found) return word[language].replace(/\$(\d)/g, (_, n) => translated(found[n]));
  }
  return line;
}

/** Workflow id -> node id -> message, for workflows that are not open. */
const waiting = new Map();

const ours = (node) => node?.comfyClass?.startsWith("SageDiffusion") ?? false;

/** Every node of this pack, those in subgraphs included. */
function* nodesOf(graph) {
  for (const node of graph?.nodes ?? []) {
    if (ours(node)) yield node;
    if (node.subgraph) yield* nodesOf(node.subgraph);
  }
}

/** The node of an execution id: "7", or "3:7" inside of subgraph node 3. */
function find(graph, id) {
  const path = String(id).split(":");
  for (const part of path.slice(0, -1)) graph = graph?.getNodeById(Number(part))?.subgraph;
  return graph?.getNodeById(Number(path.at(-1)));
}

function widgetOf(node) {
  const found = node.widgets?.find((widget) => widget.name === WIDGET);
  if (found) return found;
  const element = document.createElement("div");
  element.className = "sage-text";
  element.style.cssText =
    "overflow-y:auto; white-space:pre-wrap; overflow-wrap:anywhere; box-sizing:border-box;" +
    "padding:4px 8px; font:12px/1.35 sans-serif; color:var(--input-text); user-select:text;";
  const widget = node.addDOMWidget(WIDGET, "sage_text", element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => widget.least,
    getValue: () => element.textContent,
    setValue: () => {},
  });
  widget.serialize = false;
  widget.least = 48; // two lines
  return widget;
}

function show(node, message, old = false) {
  const widget = widgetOf(node);
  if (message !== BYPASSED && message !== MUTED) widget.message = message;
  const { element } = widget;
  const colour = COLOURS[message.state];
  const [first, second = "", ...rest] = message.text.split("\n");
  const head = document.createElement("div");
  head.textContent = `${translated(first)}\n${translated(second)}`;
  head.style.color = colour ?? "";
  head.style.fontWeight = colour ? "600" : "";
  const more = document.createElement("div");
  more.textContent = rest.join("\n");
  element.replaceChildren(head, more);
  element.dataset.state = message.state;
  element.style.opacity = old ? "0.5" : "1";
  if (old) head.prepend(`${translated("of an earlier run")}\n`);
  const red = message.state === "nothing" && !old;
  fit(node, widget, head);
  node.strokeStyles ??= {};
  node.strokeStyles.sage = () => (red ? { color: "#ee0000", lineWidth: 3 } : undefined);
  node.setDirtyCanvas?.(true, true);
}

/** Make the node as large as its headline needs, at most; never smaller than it was. */
function fit(node, widget, head) {
  const column = Math.max(node.size[0] - 40, 120);
  head.style.width = `${column}px`; // measured where it is not shown yet, too
  const attached = widget.element.isConnected;
  if (!attached) document.body.append(widget.element);
  widget.least = Math.min(Math.max(head.offsetHeight + 10, 48), 160);
  if (!attached) widget.element.remove();
  head.style.width = "";
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
}

function receive({ detail: message }) {
  const graph = app.rootGraph ?? app.graph;
  if (message.workflow && graph?.id && message.workflow !== graph.id) {
    if (!waiting.has(message.workflow)) waiting.set(message.workflow, new Map());
    waiting.get(message.workflow).set(message.node, message);
    return;
  }
  const node = find(graph, message.node);
  if (ours(node)) show(node, message);
}

/** A run begins: what stands there is of an earlier one, unless its node is taken from the cache. */
function begin() {
  for (const node of nodesOf(app.rootGraph ?? app.graph)) {
    if (node.mode === 4) show(node, BYPASSED);
    else if (node.mode === 2) show(node, MUTED);
    else {
      const message = node.widgets?.find((widget) => widget.name === WIDGET)?.message;
      if (message) show(node, message, true);
    }
  }
}

function cached({ detail }) {
  for (const id of detail.nodes ?? []) {
    const node = find(app.rootGraph ?? app.graph, id);
    const message = ours(node) && node.widgets?.find((w) => w.name === WIDGET)?.message;
    if (message) show(node, message);
  }
}

app.registerExtension({
  name: "sage_diffusion.text",
  setup() {
    api.addEventListener("sage_diffusion.text", receive);
    api.addEventListener("execution_start", begin);
    api.addEventListener("execution_cached", cached);
  },
  afterConfigureGraph() {
    const graph = app.rootGraph ?? app.graph;
    for (const [id, message] of waiting.get(graph?.id) ?? []) {
      const node = find(graph, id);
      if (ours(node)) show(node, message);
    }
    waiting.delete(graph?.id);
  },
});
