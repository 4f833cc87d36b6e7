// What Sage Attention says on the page in every state, one page for all of them.
//   node states.js URL FOLDER     reads prompts.json, writes screenshots and states.json into FOLDER
const { open, finish } = require('./page.js');
const fs = require('fs');

const [url, folder] = process.argv.slice(2);
const { sampling, check, planned, tuned, calibrated } = JSON.parse(fs.readFileSync(`${folder}/prompts.json`));
const result = { errors: [], states: {} };

async function main() {
  const { browser, page } = await open(url, { width: 1280, height: 800 }, result.errors);

  const load = (prompt, id) => page.evaluate(async ([prompt, id]) => {
    await window.app.loadApiJson(prompt, id);
    const { graph, canvas } = window.app;
    const graphs = { ...graph.serialize(), id };
    await window.app.loadGraphData(graphs, true, true, id);
    window.app.graph.arrange(60);
    canvas.ds.scale = 0.7;
    const node = window.app.graph._nodes.find((n) => /SageDiffusion(Attention|AutoTune)/.test(n.type));
    canvas.ds.offset[0] = -node.pos[0] + 420;
    canvas.ds.offset[1] = -node.pos[1] + 220;
    canvas.setDirty(true, true);
  }, [prompt, id]);
  const set = (type, values) => page.evaluate(([type, values]) => {
    const node = window.app.graph._nodes.find((n) => n.type === type);
    if ('mode' in values) node.mode = values.mode;
    for (const widget of node.widgets) {
      if (widget.name in values) { widget.value = values[widget.name]; widget.callback?.(widget.value); }
    }
  }, [type, values]);
  const queue = () => page.evaluate(() => {
    window.ended = new Promise((resolve) => {
      for (const kind of ['execution_success', 'execution_error', 'execution_interrupted']) {
        window.app.api.addEventListener(kind, () => resolve(kind), { once: true });
      }
    });
    return window.app.queuePrompt(0, 1);
  });
  const ended = () => page.evaluate(() => window.ended);
  const read = (type) => page.evaluate((type) => {
    const node = window.app.graph._nodes.find((n) => n.type === type);
    const element = node?.widgets?.find((w) => w.name === 'sage_text')?.element;
    if (!element) return null;
    const head = element.firstChild;
    return {
      state: element.dataset.state,
      text: element.innerText,
      colour: getComputedStyle(head).color,
      old: element.style.opacity === '0.5',
      lines: head.getBoundingClientRect().height / (parseFloat(getComputedStyle(head).lineHeight) * window.app.canvas.ds.scale),
      whole: head.offsetHeight <= element.clientHeight,
      fits: node.size[1] >= node.computeSize()[1],
      red: Boolean(node.strokeStyles?.sage?.()),
    };
  }, type);
  const record = async (name, kind) => {
    await page.waitForTimeout(700);
    await page.keyboard.press('Escape');
    result.states[name] = {
      end: kind,
      node: await read('SageDiffusionAttention'),
      report: await read('SageDiffusionReport'),
    };
    await page.screenshot({ path: `${folder}/state_${name}.png` });
  };
  const run = async (name) => { await queue(); await record(name, await ended()); };

  await load(sampling, 'workflow-a');
  await set('KSampler', { steps: 3 });
  await run('done');
  await set('SageDiffusionAttention', { 'preset.min_tokens': 4096 });
  await run('too_few_tokens');
  await set('SageDiffusionAttention', { 'preset.min_tokens': 0, backend: 'triton' });
  await run('backend_refuses');
  await set('SageDiffusionAttention', { strict: true });
  await run('failed');
  await set('SageDiffusionAttention', { strict: false, backend: 'auto', enabled: false });
  await run('off');
  await set('SageDiffusionAttention', { enabled: true, mode: 4 });
  await run('bypassed');
  await set('SageDiffusionAttention', { mode: 0 });
  await set('KSampler', { steps: 10000 });
  await queue();
  await page.waitForFunction(() => window.app.graph._nodes.find((n) => n.type === 'SageDiffusionAttention')
    .widgets.find((w) => w.name === 'sage_text').element.dataset.state === 'sampling', null, { timeout: 180000 });
  await record('sampling', null);
  await page.evaluate(() => window.app.api.interrupt());
  await record('cancelled', await ended());

  // A run of one workflow while another with nodes of the same ids is open.
  await set('KSampler', { steps: 300 });
  const a = await page.evaluate(() => window.app.graph.serialize());
  await queue();
  await load(sampling, 'workflow-b');
  await ended();
  await record('other_workflow', null);
  await page.evaluate((a) => window.app.loadGraphData(a, true, true, 'workflow-a'), a);
  await record('back_again', null);

  // The plan of a file travels in the workflow, in the prompt, and so in the picture.
  await load(planned, 'workflow-d');
  await page.waitForFunction(() => window.app.graph.nodes.find((n) => n.type === 'SageDiffusionAttention')
    .widgets.find((w) => w.name === 'embedded_plan').value.includes('sha256'), null, { timeout: 120000 });
  result.saved = await page.evaluate(() => JSON.stringify(window.app.graph.serialize()));
  result.prompt = await page.evaluate(async () => (await window.app.graphToPrompt()).output);
  result.hidden = await page.evaluate(() => window.app.graph.nodes.find((n) => n.type === 'SageDiffusionAttention')
    .widgets.find((w) => w.name === 'embedded_plan').hidden);
  await set('SageDiffusionAttention', { embed_plan: false });
  result.not_kept = await page.evaluate(async () => {
    const node = window.app.graph.nodes.find((n) => n.type === 'SageDiffusionAttention');
    return (await window.app.graphToPrompt()).output[node.id].inputs.embedded_plan;
  });

  await load(check, 'workflow-c');
  await run('elsewhere');

  // Its two pictures, one over the other: the line follows the mouse, pressing shows one whole.
  await page.waitForFunction(() => document.querySelector('img.with')?.naturalWidth > 0);
  result.compare = await page.evaluate(() => {
    const [without, plan] = ['img.without', 'img.with'].map((name) => document.querySelector(name));
    const box = plan.parentElement;
    const { left, top, width, height } = box.getBoundingClientRect();
    const at = (type, share, buttons) => {
      const place = { clientX: left + share * width, clientY: top + height / 2, buttons };
      box.dispatchEvent(new PointerEvent(type, { ...place, bubbles: true }));
      return plan.style.clipPath;
    };
    return {
      sizes: [without.naturalWidth, plan.naturalWidth],
      apart: without.src !== plan.src,
      clips: [at('pointermove', 0.25, 0), at('pointerdown', 0.25, 1), at('pointerup', 0.75, 0)],
    };
  });
  await page.screenshot({ path: `${folder}/compare.png` });

  // Auto-tune: a bar while it measures; workflow and picture carry the plan that it made.
  const listen = () => page.evaluate(() => {
    window.told = [];
    window.app.api.addEventListener('sage_diffusion.text', ({ detail }) => window.told.push(detail.text));
    window.app.api.addEventListener('progress_state', ({ detail }) => {
      for (const at of Object.values(detail.nodes)) window.told.push(`bar ${at.node_id} ${at.value}/${at.max}`);
    });
  });
  const embedded = () => page.evaluate(() => window.app.graph._nodes.find((n) => n.type === 'SageDiffusionAutoTune')
    ?.widgets.find((w) => w.name === 'embedded_plan').value);
  await load(tuned, 'workflow-e');
  await listen();
  await queue();
  const end = await ended();
  await page.waitForTimeout(700);
  result.tuned = { end, node: await read('SageDiffusionAutoTune'), told: await page.evaluate(() => window.told), plan: await embedded() };
  await page.screenshot({ path: `${folder}/autotune.png` });
  // The picture that it saved, dropped on an empty page.
  const picture = await page.evaluate(() => window.app.graph._nodes.find((n) => n.type === 'SaveImage').imgs[0].src);
  await page.evaluate(async (src) => {
    window.app.graph.clear();
    const blob = await (await fetch(src)).blob();
    await window.app.handleFile(new File([blob], 'a.png', { type: 'image/png' }));
  }, picture);
  await page.waitForFunction(() => window.app.graph._nodes.some((n) => n.type === 'SageDiffusionAutoTune'));
  result.tuned.received = await embedded();

  // A plan that is calibrated, end-to-end stage included, and previewed before it runs.
  await load(calibrated, 'workflow-f');
  await listen();
  await queue();
  const finished = await ended();
  await page.waitForTimeout(700);
  result.calibrated = {
    end: finished,
    node: await read('SageDiffusionCalibrate'),
    preview: await read('SageDiffusionPlanPreview'),
    ran: await read('SageDiffusionAttention'),
    told: await page.evaluate(() => window.told),
  };
  await page.screenshot({ path: `${folder}/calibrated.png` });

  // The page's own language.
  result.french = await page.evaluate(async () => {
    await window.app.extensionManager.setting.set('Comfy.Locale', 'fr');
    const node = window.app.graph._nodes.find((n) => n.type.startsWith('SageDiffusion'));
    const detail = { node: String(node.id), state: 'cancelled', text: 'cancelled while sampling\nno figures of this run' };
    window.app.api.dispatchEvent(new CustomEvent('sage_diffusion.text', { detail }));
    await window.app.extensionManager.setting.set('Comfy.Locale', 'en'); // the server keeps it
    return node.widgets.find((w) => w.name === 'sage_text').element.firstChild.textContent;
  });
  await browser.close();
}

finish(main, result, `${folder}/states.json`);
