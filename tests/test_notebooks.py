"""Every notebook runs top to bottom from what ships, alone; outputs are committed, and nothing of our machines."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

from report import build

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind="code"):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def results():
    return {path.name: path.read_bytes() for path in (ROOT / "report/results").glob("*.json")}


@by_name
def test_runs(path, tmp_path):
    before = results()
    build.execute_notebook(path, tmp_path / path.name)
    assert results() == before, "the results that a notebook writes are the same bytes every time"
    executed = cells(tmp_path / path.name)
    assert all(cell["execution_count"] for cell in executed)
    # warnings go to stderr, and so do progress bars, which are fine
    stderr = "".join("".join(o["text"]) for cell in executed for o in cell["outputs"] if o.get("name") == "stderr")
    assert "Warning" not in stderr, stderr


@by_name
def test_committed_outputs(path):
    assert path.stat().st_size < 4_000_000  # noise in colour does not compress
    code = cells(path)
    assert any(cell["outputs"] for cell in code) and all(cell["execution_count"] for cell in code)
    text = json.dumps([[o for o in cell["outputs"] if o["output_type"] != "display_data"] for cell in code])
    assert not re.search(r"/(home|Users|work|root)/", text)
    assert not any(o["output_type"] == "error" for cell in code for o in cell["outputs"])


@by_name
@pytest.mark.parametrize("folder", [".", "notebooks"])
def test_finds_the_project(path, folder, monkeypatch):
    """From the repository's root (VS Code) and from notebooks/ (jupyter lab)."""
    monkeypatch.chdir(ROOT / folder)
    line = next(line for line in source(cells(path)[0]).splitlines() if line.startswith("ROOT ="))
    names = {"Path": Path}
    exec(line, names)
    assert names["ROOT"] == ROOT


@pytest.mark.parametrize(
    "code, words",
    [
        ("1 / 0", "broken.ipynb failed: ZeroDivisionError"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "broken.ipynb failed: Kernel died"),
    ],
)
def test_a_notebook_that_fails(code, words, tmp_path, refused):
    path = tmp_path / "broken.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), path)
    assert words in refused(lambda argv: build.execute_notebook(path, tmp_path / "out.ipynb"))
    assert not (tmp_path / "out.ipynb").exists()


def test_unknown_name(refused):
    assert "05_nothing" in refused(build.main, "notebooks", "05_nothing")
