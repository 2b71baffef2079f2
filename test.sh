#!/usr/bin/env bash
# The same set-up as run.sh, then everything that is checked: style, types, tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")"
bash run.sh setup tests/requirements.txt
printf '\n== Style and types\n'
.venv/bin/python -m ruff check .
.venv/bin/python -m mypy .
printf '\n== Tests\n'
exec .venv/bin/python -m pytest "$@"
