#!/usr/bin/env bash
# The pack inside real ComfyUI releases, installation included: what `make test-comfy` runs.
#   run.sh [arguments of pytest for the main release]
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MKL_NUM_THREADS=${MKL_NUM_THREADS:-1}
start=$SECONDS
tests/comfy/setup_comfy.sh all
tests/comfy/setup_browser.sh
echo "installed after $((SECONDS - start)) s"
pytest() { .venv-comfy/bin/python -m pytest "$@"; }
failed=0

echo "ComfyUI 0.30.0"
pytest tests/comfy --comfy .cache/comfyui-0.30.0 -p no:cacheprovider "$@" || failed=1

echo "ComfyUI 0.24.0"
pytest tests/comfy/test_in_process.py tests/comfy/test_neighbours.py tests/comfy/test_server.py \
  --comfy .cache/comfyui-0.24.0 -p no:cacheprovider \
  -k "pass_through or within_a_bound or untouched or decide_as_the_plan or previous_override \
or stays_on_top or come_and_go or between_two or never_moved or samples_and_says \
or words_on_everything or goes_round or accuracy_check_proves or doctor or neighbours_result \
or regional or two_stages" || failed=1

echo "everything took $((SECONDS - start)) s"
exit $failed
