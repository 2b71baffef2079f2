#!/usr/bin/env bash
# From a fresh clone to the report, in one command:
#
#   bash run.sh                   install what is missing, execute the notebooks, draw the figures, build the PDF
#   LASTNAME=Perez bash run.sh    the same, and the report is report/Perez_DDPM.pdf
#   bash run.sh setup             only make .venv and install requirements.txt
#
# PYTHON=python3.12 bash run.sh takes that Python; otherwise the first one that is new enough.
set -euo pipefail
cd "$(dirname "$0")"
case ${OSTYPE:-} in msys | cygwin) bin=.venv/Scripts ;; *) bin=.venv/bin ;; esac # the former: Git's bash on Windows

stage() { printf '\n== %s\n' "$*"; }
fail() { printf 'run.sh: error: %s\n' "$*" >&2; exit 2; }

new_enough='import sys; sys.exit(sys.version_info < (3, 10))'

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
        if "$candidate" -c "$new_enough" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.10 or newer among ${PYTHON:-python3, python3.10 to 3.13, python}: install one, or name it with PYTHON=..."
}

# install FILE: once, and again whenever FILE has changed; the stamp is written only when all of it is installed
install() {
    local stamp=".venv/installed-${1//\//-}"
    if cmp -s "$1" "$stamp"; then
        echo "$1: installed"
        return
    fi
    "$bin/python" -m pip install --disable-pip-version-check -r "$1" ||
        fail "could not install $1: the last lines above say why; the same command goes on from here"
    cp "$1" "$stamp"
}

setup() {
    stage "Python environment in .venv"
    if "$bin/python" -c '' 2>/dev/null; then
        "$bin/python" -c "$new_enough" ||
            fail "the Python of .venv is older than 3.10: move .venv away, then run this again"
        # half made, or made by a tool that puts no pip in: it may hold what you installed, so it stays
        "$bin/python" -c 'import pip' 2>/dev/null || "$bin/python" -m ensurepip ||
            fail ".venv has no pip and cannot get one: move it away, then run this again"
    else
        local python
        python=$(find_python)
        rm -rf .venv
        "$python" -m venv .venv || { rm -rf .venv; fail "$python cannot make a .venv: install its venv module (Debian: apt install python3-venv)"; }
    fi
    install requirements.txt
    for file in "$@"; do install "$file"; done
}

if [ "${1:-}" = setup ]; then
    setup "${@:2}"
    exit
elif [ $# -gt 0 ]; then
    fail "unknown argument $1: see the first lines of run.sh"
fi

case ${LASTNAME:-} in */* | *\\* | [-._]*) fail "LASTNAME=$LASTNAME cannot be part of a file name: use letters" ;; esac
setup
stage "Notebooks: executed copies go to build/, their figures to report/figures"
"$bin/python" report/build.py notebooks
stage "Report"
"$bin/python" report/build.py pdf --lastname "${LASTNAME:-Lastname}"
