"""From the notebooks to the report.

    python report/build.py notebooks [NAME ...]      execute notebooks/NAME.ipynb (default: all) into build/
    python report/build.py pdf --lastname Perez      typeset report/report.typ as report/Perez_DDPM.pdf
    python report/build.py tables                    fill in the tables of the README files (for authors)

The report shows a figure or a number only where its file is there, and only if the weights and statistics that it was
made from are those in checkpoints/: what is out of date is an error that says what to run.
"""

import json
import os
import re
import shutil
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import nbformat
import typst
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

REPORT = Path(__file__).resolve().parent
ROOT = REPORT.parent
sys.path.insert(0, str(ROOT))

from figures import CHECKPOINTS, FIGURES, PICTURES, RESULTS, sha256  # noqa: E402
from report import tables  # noqa: E402
from utils import ArgumentParser, UserError, atomic_path, command_line, progress  # noqa: E402


def execute_notebook(path, out, timeout=600):
    """Run all cells of a notebook in its own folder and write it, with the outputs, to `out`. Raises UserError."""
    notebook = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(path.parent)}}
    quiet = ["--log-level=ERROR"]  # ipykernel's warning about local TCP would break the bar
    settings = {"timeout": timeout, "startup_timeout": timeout, "record_timing": False, "coalesce_streams": True}
    client = NotebookClient(notebook, kernel_name="python3", resources=folder, extra_arguments=quiet, **settings)
    try:
        with client.setup_kernel():
            for index, cell in enumerate(progress(notebook.cells, desc=path.stem, unit="cell")):
                client.execute_cell(cell, index)
    except CellExecutionError as error:
        raise UserError(f"{path.name} failed: {error.ename}: {error.evalue} (open it to see the cell)") from error
    except (CellTimeoutError, RuntimeError) as error:  # the kernel died, or never answered
        advice = f"a cell may take {timeout} s, and memory may have been full: close other programs, try again"
        raise UserError(f"{path.name} failed: {str(error).splitlines()[0]} ({advice})") from error
    # the kernel's own version is no news
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    with atomic_path(out) as temporary:
        nbformat.write(notebook, temporary)


def run_notebooks(args):
    os.environ["DDPM_PUBLISHING"] = "1"  # see figures.py
    if not args.names:  # all figures are drawn again; what no notebook draws any more must not stay
        shutil.rmtree(FIGURES, ignore_errors=True)
    for path in [ROOT / f"notebooks/{name}.ipynb" for name in args.names] or sorted(ROOT.glob("notebooks/*.ipynb")):
        out = path if args.inplace else ROOT / "build" / path.name
        execute_notebook(path, out)
        print(f"wrote {out.relative_to(ROOT)}")
    for name in ("best_scale_cifar10.svg", "denoising.gif"):  # README.md shows them, and so they are committed
        if args.inplace and (FIGURES / name).exists():
            shutil.copyfile(FIGURES / name, PICTURES / name)


def claims(value):
    """Pairs (what, SHA-256) of the files that a result, or a part of one, was made from."""
    for key, part in value.items():
        if key == "sha256":
            yield value.get("checkpoint") or value.get("name") or "reference", part
        elif key == "reference" and value["features"]["name"] != value["data"]:
            pass  # computed in another data set's features, and so not in checkpoints/
        elif key != "config":  # which may name the checkpoint that a training started from
            for inner in part if isinstance(part, list) else [part]:
                yield from claims(inner) if isinstance(inner, dict) else ()


def available():
    """The names of the figures and results that the report can use. Raises UserError for one that is out of date."""
    figures = {}
    for path in sorted(FIGURES.glob("*.json")):
        record = json.loads(path.read_text())
        file = figures[path.stem] = record["file"]
        for source, recorded in record["sources"].items():
            if not (ROOT / source).is_file() or sha256(ROOT / source) != recorded:
                raise UserError(f"{file} was drawn from another {source}: run `python report/build.py notebooks`")
    results = sorted(RESULTS.glob("*.json"))
    checkpoints = {sha256(path) for path in CHECKPOINTS.glob("*.safetensors")}
    for path in results:
        for name, recorded in claims(json.loads(path.read_text())):
            if recorded not in checkpoints and name != "model.safetensors":  # a run's own, which need not ship
                raise UserError(f'{path.name} was made from another {name} than is there: run its "command" again')
    return {"figures": figures, "results": [path.stem for path in results]}


def typst_options(lastname):
    """What the compiler is given; its root is the repository, because the report quotes the code."""
    inputs = {"lastname": lastname, "available": json.dumps(available())}
    return {"root": REPORT.parent, "ignore_system_fonts": True, "sys_inputs": inputs}


def build_pdf(lastname, out=None, allow_missing=True):
    """Typeset the report; returns the PDF's path. Raises UserError."""
    if not re.fullmatch(r"[^\W_][\w\u0300-\u036f.'’ -]*", lastname):
        raise UserError(f"LASTNAME={lastname!r} cannot be part of a file name: use letters")
    shown = set(re.findall(r'picture\("(\w+)"', "".join(path.read_text() for path in REPORT.glob("*.typ"))))
    missing = sorted(shown - {path.stem for path in FIGURES.glob("*.json")})
    if missing and not allow_missing:
        todo = "run `python report/build.py notebooks`, or go on without them by --allow-missing"
        raise UserError(f"{len(missing)} figures are not drawn yet ({', '.join(missing)}): {todo}")
    out = out or REPORT / f"{lastname}_DDPM.pdf"
    try:  # with the same time in every PDF, so that equal contents are equal bytes
        pdf = typst.compile(REPORT / "report.typ", timestamp=1_700_000_000, **typst_options(lastname))
    except typst.TypstError as error:
        place = re.search(r"┌─ (\S+)", error.diagnostic)  # file:line:column
        raise UserError(f"{place[1] if place else 'the report'} does not compile: {error.message}") from error
    with atomic_path(out) as temporary:
        temporary.write_bytes(pdf)
    return out


def run_pdf(args):
    path = build_pdf(args.lastname, allow_missing=args.allow_missing)
    print(f"wrote {path.relative_to(ROOT)}")
    if args.publish:
        print("wrote", Path(shutil.copy(path, REPORT / "published")).relative_to(ROOT))


def run_tables(args):
    for path, text in tables.filled().items():
        with atomic_path(path) as temporary:
            temporary.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")


def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    notebooks = commands.add_parser("notebooks", help="execute the notebooks")
    notebooks.add_argument("names", nargs="*", metavar="NAME", help="such as 01_forward_process (default: all)")
    notebooks.add_argument("--inplace", action="store_true", help="write the outputs into notebooks/ (for authors)")
    notebooks.set_defaults(run=run_notebooks)
    pdf = commands.add_parser("pdf", help="typeset the report")
    pdf.add_argument("--lastname", default="Lastname", help="the name on it and in its file name (default: Lastname)")
    pdf.add_argument("--publish", action="store_true", help="also write it to report/published/ (for authors)")
    pdf.add_argument("--allow-missing", action="store_true", help="go on where figures have not been drawn")
    pdf.set_defaults(run=run_pdf)
    commands.add_parser("tables", help="fill in the tables of the README files").set_defaults(run=run_tables)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    command_line(main)
