#!/usr/bin/env bash
# The same set-up as run.sh, then everything that is checked: style, types, tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")"
case ${OSTYPE:-} in msys | cygwin) bin=.venv/Scripts ;; *) bin=.venv/bin ;; esac
bash run.sh setup tests/requirements.txt
printf '\n== Style and types\n'
"$bin/python" -m ruff check .
"$bin/python" -m ruff format --check .
"$bin/python" -m mypy .
printf '\n== Tests\n'
exec "$bin/python" -m pytest "$@"
