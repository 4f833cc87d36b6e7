// Keeps the plan of a chosen file in the workflow, and so in prompts and pictures.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const NODES = new Set(["SageDiffusionAttention", "SageDiffusionLoadPlan"]);
const FILES = ["file", "preset.file"];

const widget = (node, name) => node.widgets?.find((one) => one.name === name);
const fileOf = (node) => FILES.map((name) => widget(node, name)).find(Boolean)?.value ?? "";

function carried(text) {
  try {
    return JSON.parse(text).file;
  } catch {
    return undefined;
  }
}

/** Fetch what the node's file holds, unless the workflow carries a plan of that name already. */
async function fill(node) {
  const embedded = widget(node, "embedded_plan");
  const file = widget(node, "embed_plan")?.value === false ? "" : fileOf(node);
  if (!embedded || carried(embedded.value) === file) return;
  if (!file) {
    embedded.value = "";
    return;
  }
  const answer = await api.fetchApi(`/sage_diffusion/plan?file=${encodeURIComponent(file)}`);
  if (fileOf(node) === file) embedded.value = answer.ok ? (await answer.json()).text : "";
}

/** Auto-tune makes its plan while it runs: the workflow carries it from then on. */
function keepTuned(node) {
  const executed = node.onExecuted;
  node.onExecuted = function (output, ...rest) {
    executed?.call(this, output, ...rest);
    const embedded = widget(this, "embedded_plan");
    if (embedded && output?.embedded_plan) embedded.value = output.embedded_plan[0];
  };
}

function* nodesOf(graph) {
  for (const node of graph?.nodes ?? []) {
    if (NODES.has(node.comfyClass)) yield node;
    if (node.subgraph) yield* nodesOf(node.subgraph);
  }
}

app.registerExtension({
  name: "sage_diffusion.plans",
  afterConfigureGraph() {
    for (const node of nodesOf(app.rootGraph ?? app.graph)) fill(node);
  },
  nodeCreated(node) {
    if (node.comfyClass === "SageDiffusionAutoTune") keepTuned(node);
    if (!NODES.has(node.comfyClass)) return;
    const embedded = widget(node, "embedded_plan");
    if (!embedded) return;
    embedded.serializeValue = async () => {
      await fill(node);
      return embedded.value;
    };
    const changed = node.onWidgetChanged;
    node.onWidgetChanged = function (name, value, ...rest) {
      changed?.call(this, name, value, ...rest);
      if (FILES.includes(name)) embedded.value = ""; // chosen anew: take the file as it is now
      if (FILES.includes(name) || name === "embed_plan" || name === "preset") fill(node);
    };
  },
});
