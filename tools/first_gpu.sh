#!/usr/bin/env bash
# A first run on a machine with an NVIDIA card: tools/first_gpu.sh [options of benchmarks.first_gpu]
#
# The machine may be bare: Python 3.10 or newer, PyTorch, the Triton that belongs to it and a C
# compiler; no network, no installation of this package.  What is missing of its dependencies may lie
# as wheels in .whl/ (pip download --only-binary :all: -d .whl pydantic jinja2 rich typer pillow).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if ls .whl/*.whl > /dev/null 2>&1; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
        --target "$work/site" .whl/*.whl
    export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
fi
"$python" - << 'PY'
import importlib.util, sys

needed = {"torch": "torch", "triton": "triton", "numpy": "numpy", "pydantic": "pydantic"}
missing = [wheel for module, wheel in needed.items() if importlib.util.find_spec(module) is None]
if missing:
    sys.exit(f"first_gpu: not installed: {', '.join(missing)}; put the wheels into .whl/")
PY
export PYTHONUNBUFFERED=1
# An interrupt ends the section that is running; what there is is written and printed.
timeout --signal=INT --kill-after=20 "${LIMIT:-340}" "$python" -m benchmarks.first_gpu "$@"
