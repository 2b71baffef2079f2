"""The PDF builds at every stage, says only what its files say, and is the same bytes every time; and the search."""

import json
import re
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import typst
from conftest import ROOT

import figures
import training
from ddpm import Diffusion
from report import build, search, tables
from utils import UserError, generator

REPORT = "".join((ROOT / f"report/{name}.typ").read_text() for name in ("report", "point1", "point2", "bonus"))


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Figures, results and checkpoints in an empty place of their own."""
    for name in ("FIGURES", "RESULTS", "CHECKPOINTS"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(build, name, tmp_path / name)
        monkeypatch.setattr(figures, name, tmp_path / name)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    return tmp_path


def test_builds_from_what_is_there(tmp_path):
    first, second = (build.build_pdf("Perez", tmp_path / name).read_bytes() for name in ("a.pdf", "b.pdf"))
    assert first.startswith(b"%PDF") and first == second


def test_at_most_18_pages():
    options = build.typst_options("Perez")
    pages = typst.query(ROOT / "report/report.typ", "<pages>", field="value", one=True, **options)
    assert json.loads(pages) <= 18


def copy_of_the_report(folder, monkeypatch):
    """The report's sources and the code that they quote, to be changed; nothing has been drawn."""
    (folder / "report").mkdir()
    for source in (*ROOT.glob("*.py"), *ROOT.glob("report/*.typ")):
        shutil.copy(source, folder / source.relative_to(ROOT))
    monkeypatch.setattr(build, "REPORT", folder / "report")
    return folder


def test_an_error_is_shown_with_its_line(folders, monkeypatch):
    path = copy_of_the_report(folders, monkeypatch) / "report/bonus.typ"
    path.write_text("#let x = 1\n#let y = (\n" + path.read_text())
    with pytest.raises(UserError, match=r"report/bonus.typ:2:\d+ does not compile: unclosed delimiter"):
        build.build_pdf("Perez")


def test_code_that_is_gone_is_not_quoted(folders, monkeypatch):
    path = copy_of_the_report(folders, monkeypatch) / "ddpm.py"
    build.build_pdf("Perez")
    path.write_text(path.read_text().replace("Homework TODO 506", "Homework"))
    with pytest.raises(UserError, match="ddpm.py has no line with 'Homework TODO 506'"):
        build.build_pdf("Perez")


def test_missing_figures_are_named(folders, refused):
    figures.record("betas", ".svg", b"<svg/>", [])
    message = refused(build.main, "pdf", "--lastname=Perez")
    assert "wrong_prior" in message and "betas" not in message and "--allow-missing" in message


@pytest.mark.parametrize("name", ["de la Cruz", "O’Neil Jr.", "Müller-Lu\u0308denscheidt"])
def test_builds_before_anything_is_trained(name, folders, tmp_path):
    assert build.available() == {"figures": {}, "results": []}
    assert build.build_pdf(name, tmp_path / "empty.pdf").read_bytes().startswith(b"%PDF")


def test_every_question_is_answered_in_order():
    points = [float(p) for p in re.findall(r'^#question\("([0-9.]+)"\)', REPORT, re.MULTILINE)]
    assert points == [0.3125, 0.3125, 0.3125, 0.3125, 1.25, 0.25, 0.5, 0.5, 1.0]


def families(saved):
    """The beginnings of names that a notebook completes, as in f"four_way_{name}"."""
    return tuple(name for name in saved if name.endswith("_"))


def test_every_picture_is_drawn_by_a_notebook():
    notebooks = [json.loads(path.read_text()) for path in (ROOT / "notebooks").glob("*.ipynb")]
    sources = "".join("".join(cell["source"]) for notebook in notebooks for cell in notebook["cells"])
    saved = set(re.findall(r'figures\.save\(.*?f?"([a-z_0-9]+)[{"]', sources, re.DOTALL))
    used = set(re.findall(r'picture\("([a-z_0-9]+)"', REPORT))
    assert used and not {name for name in used if name not in saved and not name.startswith(families(saved))}


def test_stale_figure_is_refused(folders):
    weights = folders / "CHECKPOINTS" / "a.safetensors"
    weights.write_bytes(b"old")
    figures.record("dots", ".png", b"picture", [weights])
    assert build.available()["figures"] == {"dots": "dots.png"}
    weights.write_bytes(b"new")
    with pytest.raises(UserError, match="dots.png was drawn from another CHECKPOINTS/a.safetensors"):
        build.available()


@pytest.mark.parametrize(
    "result",
    [
        {"checkpoint": "a.safetensors", "sha256": "0" * 64},
        {"rows": [{"data": "x", "features": {"name": "x", "sha256": "0" * 64}}]},
        {"deep": {"data": "x", "features": {"name": "x"}, "reference": {"sha256": "0" * 64}}},
        {"runs": [{"name": "b", "sha256": "0" * 64, "config": {}}]},
    ],
)
def test_stale_result_is_refused(folders, result):
    for name in ("a", "features_x", "reference_x", "grid_b"):
        (folders / "CHECKPOINTS" / f"{name}.safetensors").write_bytes(b"weights")
    path = folders / "RESULTS" / "numbers.json"
    path.write_text(json.dumps(result))
    with pytest.raises(UserError, match="numbers.json was made from a"):
        build.available()
    right = figures.sha256(folders / "CHECKPOINTS" / "a.safetensors")
    path.write_text(json.dumps(result).replace("0" * 64, right))
    assert build.available()["results"] == ["numbers"]


def test_a_computed_reference_need_not_ship(folders):
    """Of a data set that is measured in another's features; nor need the checkpoint that a training started from."""
    weights = folders / "CHECKPOINTS" / "features_y.safetensors"
    weights.write_bytes(b"weights")
    result = {
        "data": "x",
        "features": {"name": "y", "sha256": figures.sha256(weights)},
        "reference": {"sha256": "0" * 64},
        "config": {"train": {"init": {"checkpoint": "z.safetensors", "sha256": "0" * 64}}},
        "how many": {"checkpoint": 3},
    }
    (folders / "RESULTS" / "numbers.json").write_text(json.dumps(result))
    assert build.available()["results"] == ["numbers"]


@pytest.mark.parametrize("name", ["", "../x", "a/b", "-rf"])
def test_bad_last_name(name, refused):
    assert "LASTNAME" in refused(build.main, "pdf", f"--lastname={name}")


def test_tables_are_what_the_results_say():
    """`python report/build.py tables` would change nothing."""
    for path, text in tables.filled().items():
        assert path.read_text() == text, f"{path} is out of date: run `python report/build.py tables`"


def test_findings_of_the_readme_are_measured():
    """Its three findings are typed, so that they can be read as sentences; their numbers are those of the results."""
    text = (ROOT / "README.md").read_text()
    left = figures.read_result("forward_process")["T200"]["linear"]["alphas_cumprod_end"]
    rows = figures.read_result("sweep_cifar10")["rows"]
    plain = {(row["weights"], row["cfg_scale"]): tables.distance(row) for row in rows}
    raw, ema = plain["raw", 1], plain["ema", 1]
    inside = figures.read_result("intervals_cifar10")["rows"]
    guided = next(row for row in inside if f"--cfg-scale {row['cfg_scale']:g} --cfg-interval 200 600" in text)
    assert f"leaves {left:.0%} of the image's variance" in text
    assert f"the distance on CIFAR-10 falls by {1 - ema / raw:.0%}" in text
    best = min(distance for (weights, _), distance in plain.items() if weights == "ema")
    assert re.search(f"from {ema:.2f} to {best:.2f}; guiding only .*, to {tables.distance(guided):.2f}", text)


def test_plots_are_reproducible(folders):
    for name in ("a", "b"):
        figures.use_style()
        fig, axes = figures.subplots()
        axes.plot([0, 1], [1, 0], label="line", **figures.SCHEDULE_STYLE["linear"])
        axes.legend()
        figures.save(fig, name)
    a, b = ((folders / "FIGURES" / f"{name}.svg").read_bytes() for name in ("a", "b"))
    assert a == b and b"<dc:date>" not in a


def test_results_are_published_by_the_build_alone(folders, monkeypatch):
    """Whoever changes a cell in JupyterLab must not change the report's numbers. Published numbers have six digits."""
    figures.save_result("x", {"a": 1})
    assert figures.read_result("x") is None
    monkeypatch.setattr(figures, "PUBLISHING", True)
    figures.save_result("x", {"a": 1 / 3, "b": [2e-9 / 3, 7], "c": None})
    assert figures.read_result("x") == {"a": 0.333333, "b": [6.66667e-10, 7], "c": None}
    assert figures.read_result("missing") is None


# --- the search ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", search.TRIALS["fashion_mnist"])
def test_every_change_trains(name, tiny_data, monkeypatch):
    monkeypatch.setattr(search, "load_data", lambda *_, **__: tiny_data)
    monkeypatch.setattr(training, "TIMESTEP_SAMPLING", training.TIMESTEP_SAMPLING.copy())
    run = search.start(search.TRIALS["fashion_mnist"][name], "fashion_mnist", seed=0)
    before = [p.clone() for p in run.model.parameters()]
    search.make_steps(run, minutes=0.001)
    assert run.step % 2 == 0 and any((p != q).any() for p, q in zip(run.model.parameters(), before, strict=True))


def test_the_changes_are_what_they_say():
    diffusion, network = Diffusion(1000, "cosine"), Mock(return_value=torch.full((4, 1, 2, 2), 0.5))
    run = SimpleNamespace(diffusion=diffusion, model=network)
    search.predict_v(run)
    x0, noise = torch.randn(2, 4, 1, 2, 2, generator=generator(0))
    t, a = torch.tensor([0, 10, 500, 990]), diffusion.alphas_cumprod[[0, 10, 500, 990]].view(-1, 1, 1, 1)
    error = (0.5 - a.sqrt() * noise + (1 - a).sqrt() * x0) ** 2
    torch.testing.assert_close(diffusion.loss(run.model, x0, t, noise), error.mean(), rtol=1e-3, atol=0)
    a = diffusion.alphas_cumprod[search.laplace_timesteps(diffusion, 20_000, generator(0))]
    log_snr = (a / (1 - a)).log()
    assert log_snr.median().abs() < 0.03 and log_snr.abs().mean() == pytest.approx(0.5, abs=0.03)
