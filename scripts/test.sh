#!/usr/bin/env bash
# Form, lint, types, copy check and tests, as CI runs them. Makes .venv first where it is missing or older than the requirements.
#
#   scripts/test.sh                             everything
#   scripts/test.sh tests/test_house.py -x      arguments go to pytest; paths are relative to the repository
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

. scripts/venv.sh requirements-dev.txt

unset PYTHONDONTWRITEBYTECODE  # a file is compiled once, not at each start of a script
"$python" -m ruff format --check .
"$python" -m ruff check .  # docstrings, too
"$python" -m ty check --quiet
"$python" scripts/check_copies.py
"$python" -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"  # three files at a time, each test with one thread
