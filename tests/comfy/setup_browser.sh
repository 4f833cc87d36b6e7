#!/usr/bin/env bash
# Chromium and playwright-core for tests/comfy/test_browser.py; safe to call again.
set -euo pipefail
cd "$(dirname "$0")/../.."
if ! command -v chromium >/dev/null && ! command -v chromium-browser >/dev/null; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null
  else
    echo "no Chromium here and no right to install one: the browser tests will be skipped"
  fi
fi
if [ ! -d .cache/browser/node_modules/playwright-core ]; then
  if ! command -v npm >/dev/null; then
    echo "no npm here: the browser tests will be skipped"
    exit 0
  fi
  mkdir -p .cache/browser
  (cd .cache/browser && echo '{"private": true}' >package.json &&
    npm install --no-audit --no-fund --silent playwright-core@1.65.1)
fi
