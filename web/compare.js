// Attention Accuracy Check: the picture without the plan and with it, one over the other.
//
// The line follows the mouse; pressed, one picture shows whole, so that clicking makes them blink.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const WIDGET = "sage_compare";

const address = (image) => api.apiURL(`/view?${new URLSearchParams(image)}${app.getRandParam()}`);

/** Two pictures in one box; `split` is what the left one takes of the width, 0 .. 1. */
function box() {
  const element = document.createElement("div");
  element.style.cssText = "position:relative; overflow:hidden; cursor:ew-resize; user-select:none;";
  const [without, plan] = ["without", "with"].map((name) => {
    const image = document.createElement("img");
    image.className = name;
    image.draggable = false;
    image.style.cssText = "position:absolute; inset:0; width:100%; height:100%; object-fit:contain;";
    element.append(image);
    return image;
  });
  const label = document.createElement("div");
  label.textContent = "left: without the plan, right: with it; hold the button: only with it";
  label.style.cssText = "position:absolute; left:4px; bottom:2px; font:11px sans-serif;" +
    "color:#fff; text-shadow:0 0 3px #000; pointer-events:none;";
  element.append(label);
  const split = (at) => {
    plan.style.clipPath = `inset(0 0 0 ${100 * at}%)`;
    element.dataset.split = at.toFixed(2);
  };
  const place = (event) => {
    const { left, width } = element.getBoundingClientRect();
    return Math.min(Math.max((event.clientX - left) / width, 0), 1);
  };
  element.addEventListener("pointermove", (event) => split(event.buttons ? 0 : place(event)));
  element.addEventListener("pointerdown", () => split(0));
  element.addEventListener("pointerup", (event) => split(place(event)));
  split(0.5);
  return { element, without, plan };
}

function show(node, [without], [plan]) {
  let widget = node.widgets?.find((one) => one.name === WIDGET);
  if (!widget) {
    const made = box();
    widget = node.addDOMWidget(WIDGET, "sage_compare", made.element, {
      serialize: false,
      hideOnZoom: false,
      getMinHeight: () => 240,
      getValue: () => "",
      setValue: () => {},
    });
    widget.serialize = false;
    widget.box = made;
  }
  widget.box.without.src = address(without);
  widget.box.plan.src = address(plan);
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
}

app.registerExtension({
  name: "sage_diffusion.compare",
  nodeCreated(node) {
    if (node.comfyClass !== "SageDiffusionAccuracyCheck") return;
    const executed = node.onExecuted;
    node.onExecuted = function (output, ...rest) {
      executed?.call(this, output, ...rest);
      if (output?.a_images?.length && output?.b_images?.length) {
        show(this, output.a_images, output.b_images);
      }
    };
  },
});
