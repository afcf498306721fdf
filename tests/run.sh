#!/usr/bin/env bash
# Sets itself up, then runs the tests: bash tests/run.sh [--all] [pytest arguments]
# Without --all the tests marked slow or browser are left out. --all needs Chromium with its driver. Two run at a time; -n 0: one, as --pdb needs it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then sed -n 's/^# //p' tests/run.sh; echo "pytest's own arguments: python -m pytest --help"; exit; fi
selection=(-m "not slow and not browser")
if [ "${1:-}" = --all ]; then selection=(); shift; fi
bash run_all.sh --setup-only test
exec "${VIRTUAL_ENV:-${CONDA_PREFIX:-.venv}}/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder ${selection[@]+"${selection[@]}"} "$@"
