// The real page, as a new user meets it: open a template, drag a node, run, read the report, help, search.
//   node browser.js URL FOLDER     writes screenshots and result.json into FOLDER
const { open, finish } = require('./page.js');

const [url, folder] = process.argv.slice(2);
const result = { blocked: [], errors: [], console: [] };

async function main() {
  const { browser, page } = await open(url, { width: 1600, height: 950 }, result.errors, async (page) => {
    await page.route('**/*', (route) => {
      const host = new URL(route.request().url()).hostname;
      if (host === '127.0.0.1' || host === '') return route.continue();
      result.blocked.push(host);
      return route.abort();
    });
    page.on('console', (message) => {
      if (message.type() === 'error') result.console.push(`${message.text()} ${message.location().url}`);
    });
  });
  const shot = (name) => page.screenshot({ path: `${folder}/${name}.png` });

  // The template, from the dialog that people use.
  await page.evaluate(() => window.app.extensionManager.command.execute('Comfy.BrowseTemplates'));
  const pack = page.getByText('sage_diffusion', { exact: false }).first();
  await pack.waitFor({ timeout: 120000 });
  await pack.click();
  const card = page.getByText('First try - SD 1.5', { exact: false }).first();
  await card.waitFor({ timeout: 120000 });
  await page.waitForTimeout(1500);
  await shot('templates');
  result.templates = await page.evaluate(async () => (await (await fetch('/api/workflow_templates')).json()).sage_diffusion);
  await card.click();
  await page.waitForFunction(() => window.app.graph._nodes.some((n) => n.type === 'SageDiffusionAttention'), null, { timeout: 120000 });
  await page.waitForTimeout(1500);
  await page.keyboard.press('Escape');

  // Small enough for a CPU, as the note in the template says.
  await page.evaluate(() => {
    const { graph, canvas } = window.app;
    const set = (type, values) => {
      for (const widget of graph._nodes.find((n) => n.type === type).widgets) {
        if (widget.name in values) { widget.value = values[widget.name]; widget.callback?.(widget.value); }
      }
    };
    set('EmptyLatentImage', { width: 128, height: 128 });
    set('KSampler', { steps: 3 });
    canvas.ds.scale = 0.75;
    const note = graph._nodes.find((n) => n.type === 'MarkdownNote');
    canvas.ds.offset[0] = -note.pos[0] + 120;
    canvas.ds.offset[1] = -note.pos[1] + 110;
    canvas.setDirty(true, true);
  });
  await page.waitForTimeout(800);

  // Drag the node by its title.
  const place = () => page.evaluate(() => {
    const node = window.app.graph._nodes.find((n) => n.type === 'SageDiffusionAttention');
    const { canvas, ds } = window.app.canvas;
    const rect = canvas.getBoundingClientRect();
    return {
      x: rect.left + (node.pos[0] + ds.offset[0] + 90) * ds.scale,
      y: rect.top + (node.pos[1] + ds.offset[1] - 14) * ds.scale,
      at: [node.pos[0], node.pos[1]],
    };
  });
  const before = await place();
  await page.mouse.move(before.x, before.y);
  await page.mouse.down();
  await page.mouse.move(before.x, before.y - 30, { steps: 6 });
  await page.mouse.move(before.x + 10, before.y - 60, { steps: 6 });
  await page.mouse.up();
  result.dragged = [before.at, (await place()).at];

  // Run it.
  const finished = page.evaluate(() => new Promise((resolve, reject) => {
    window.app.api.addEventListener('execution_success', () => resolve(true));
    window.app.api.addEventListener('execution_error', (e) => reject(new Error(JSON.stringify(e.detail).slice(0, 1000))));
  }));
  result.queued = await page.evaluate(() => window.app.queuePrompt(0, 1));
  await finished;
  await page.waitForTimeout(2500);
  result.shown = await page.evaluate(() => {
    const found = {};
    for (const node of window.app.graph._nodes) {
      const texts = (node.widgets || []).map((w) => w.value).filter((v) => typeof v === 'string' && v.includes('attention calls'));
      if (texts.length) found[node.type] = texts[0];
      if (node.imgs?.length) found[`${node.type} image`] = node.imgs[0].naturalWidth;
    }
    return found;
  });
  result.visible = await page.evaluate(() => document.body.innerText.includes('of 42 attention calls'));
  await page.mouse.move(20, 700); // no tooltip in the picture
  await page.waitForTimeout(800);
  await shot('run');

  // Help of the selected node.
  await page.evaluate(() => {
    const node = window.app.graph._nodes.find((n) => n.type === 'SageDiffusionAttention');
    window.app.canvas.selectNode ? window.app.canvas.selectNode(node) : window.app.canvas.select(node);
  });
  await page.waitForTimeout(800);
  await page.evaluate(() => document.querySelector('[data-testid="info-button"]')?.click());
  await page.getByText('Together with other nodes').first().waitFor({ state: 'attached', timeout: 120000 });
  result.help = true;
  await page.waitForTimeout(800);
  await shot('help');

  // Search by an alias, add by Enter.
  const count = () => page.evaluate(() => window.app.graph._nodes.filter((n) => n.type === 'SageDiffusionAccuracyCheck').length);
  await page.mouse.dblclick(1130, 220);
  await page.waitForTimeout(1000);
  await page.keyboard.type('A/B test');
  await page.waitForTimeout(1500);
  await shot('search');
  await page.keyboard.press('Enter');
  await page.waitForTimeout(1000);
  result.added = await count();

  // Every template, as the page would send it to the server.
  result.prompts = {};
  for (const name of result.templates) {
    result.prompts[name] = await page.evaluate(async (name) => {
      const answer = await fetch(`/api/workflow_templates/sage_diffusion/${encodeURIComponent(name)}.json`);
      await window.app.loadGraphData(await answer.json(), true, true, name);
      return (await window.app.graphToPrompt()).output;
    }, name);
  }
  await browser.close();
}

finish(main, result, `${folder}/result.json`);
