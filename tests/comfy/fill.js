// A hole in a photograph: upload, paint it in the mask editor, have it filled, look at the variants.
//   node fill.js URL FOLDER PHOTOGRAPH     writes screenshots and fill.json into FOLDER
const { open, finish } = require('./page.js');

const [url, folder, photograph] = process.argv.slice(2);
const result = { errors: [] };

async function main() {
  const { browser, page } = await open(url, { width: 1600, height: 950 }, result.errors);
  const shot = (name) => page.screenshot({ path: `${folder}/${name}.png` });

  await page.evaluate(() => window.app.extensionManager.command.execute('Comfy.BrowseTemplates'));
  await page.getByText('sage_diffusion', { exact: false }).first().click();
  await page.getByText('vq_fill', { exact: false }).first().click();
  await page.waitForFunction(() => window.app.graph._nodes.some((n) => n.type === 'SageDiffusionVQFill'));
  await page.waitForTimeout(1500);
  await page.keyboard.press('Escape');
  await page.evaluate(() => {
    const { graph, canvas } = window.app;
    for (const widget of graph._nodes.find((n) => n.type === 'SageDiffusionVQFill').widgets) {
      if (widget.name === 'variants') widget.value = 2;
      if (widget.name === 'steps') widget.value = 6;
    }
    const note = graph._nodes.find((n) => n.type === 'MarkdownNote');
    canvas.ds.scale = 0.75;
    canvas.ds.offset[0] = -note.pos[0] + 120;
    canvas.ds.offset[1] = -note.pos[1] + 110;
    canvas.setDirty(true, true);
  });

  const choosing = page.waitForEvent('filechooser');
  await page.evaluate(() => {
    const node = window.app.graph._nodes.find((n) => n.type === 'LoadImage');
    node.widgets.find((w) => w.name === 'upload').callback();
  });
  await (await choosing).setFiles(photograph);
  await page.waitForFunction(() => {
    const node = window.app.graph._nodes.find((n) => n.type === 'LoadImage');
    return node.widgets.find((w) => w.name === 'image').value === 'photograph.png' && node.imgs?.[0]?.naturalWidth === 128;
  });

  await page.evaluate(() => window.app.canvas.selectNode(window.app.graph._nodes.find((n) => n.type === 'LoadImage')));
  await page.waitForTimeout(500);
  await page.evaluate(() => window.app.extensionManager.command.execute('Comfy.MaskEditor.OpenMaskEditor'));
  const save = page.getByRole('button', { name: /Save$/ }); // after its icon's letter
  await save.waitFor();
  await page.waitForTimeout(1500);
  const canvas = await page.locator('canvas[width="128"]').first().boundingBox();
  const at = (x, y) => [canvas.x + x * canvas.width, canvas.y + y * canvas.height];
  await page.mouse.move(...at(0.4, 0.5));
  await page.mouse.down();
  await page.mouse.move(...at(0.6, 0.5), { steps: 10 });
  await page.mouse.up();
  await page.waitForTimeout(500);
  await shot('fill_mask');
  await save.click();
  await page.waitForFunction(() => {
    const node = window.app.graph._nodes.find((n) => n.type === 'LoadImage');
    return node.widgets.find((w) => w.name === 'image').value.includes('painted-masked');
  });

  const finished = page.evaluate(() => new Promise((resolve, reject) => {
    window.app.api.addEventListener('execution_success', () => resolve(true));
    window.app.api.addEventListener('execution_error', (e) => reject(new Error(JSON.stringify(e.detail).slice(0, 1000))));
  }));
  await page.evaluate(() => window.app.queuePrompt(0, 1));
  await finished;
  await page.waitForTimeout(2500);
  result.filled = await page.evaluate(() => {
    const of = (type) => window.app.graph._nodes.filter((n) => n.type === type);
    const pixels = (image) => {
      const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
      const context = canvas.getContext('2d');
      context.drawImage(image, 0, 0);
      return context.getImageData(0, 0, canvas.width, canvas.height).data;
    };
    const [before, after] = of('PreviewImage').map((n) => [...n.imgs]);
    const plain = pixels(before[0]);
    // Largest change of each row of a variant against the photograph that was only decoded.
    const changes = after.map((image) => {
      const got = pixels(image), rows = Array(image.naturalHeight).fill(0);
      got.forEach((value, i) => {
        const row = Math.floor(i / (4 * image.naturalWidth));
        rows[row] = Math.max(rows[row], Math.abs(value - plain[i]));
      });
      return rows;
    });
    return {
      image: of('LoadImage')[0].widgets.find((w) => w.name === 'image').value,
      text: of('SageDiffusionVQFill')[0].widgets.map((w) => w.value).find((v) => typeof v === 'string' && v.includes('filled')),
      sizes: [...before, ...after].map((image) => [image.naturalWidth, image.naturalHeight]),
      changes,
    };
  });
  await shot('fill');
  await browser.close();
}

finish(main, result, `${folder}/fill.json`);
