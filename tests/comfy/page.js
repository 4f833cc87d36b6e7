// ComfyUI's page, loaded and with nothing in front of it; what the scripts beside this one begin and end with.
const { chromium } = require('playwright-core');
const fs = require('fs');

// prepare(page) runs before the page is asked for; errors of the page go into `errors`.
async function open(url, viewport, errors, prepare = async () => {}) {
  const browser = await chromium.launch({
    executablePath: process.env.CHROMIUM || '/usr/bin/chromium',
    headless: true,
    args: ['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-component-update', '--disable-sync'],
  });
  const page = await (await browser.newContext({ viewport })).newPage();
  page.on('pageerror', (error) => errors.push(error.message));
  page.setDefaultTimeout(180000); // a busy machine is slow to load the page
  await prepare(page);
  await page.goto(url, { waitUntil: 'domcontentloaded' });
  await page.waitForFunction(() => {
    try {
      return window.app?.graph && Object.keys(window.LiteGraph.registered_node_types).length > 50;
    } catch { return false; }
  });
  await page.evaluate(async () => {
    const setting = window.app.extensionManager.setting;
    await setting.set('Comfy.TutorialCompleted', true);
    await setting.set('Comfy.Minimap.Visible', false);
  });
  await page.waitForTimeout(1500);
  await page.keyboard.press('Escape');
  return { browser, page };
}

// Runs main() and writes what it found, or why it failed, into `file`.
function finish(main, result, file) {
  main()
    .catch((error) => { result.failure = String(error.stack || error); })
    .finally(() => {
      fs.writeFileSync(file, JSON.stringify(result, null, 2));
      process.exit(result.failure ? 1 : 0);
    });
}

module.exports = { open, finish };
