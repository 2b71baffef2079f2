"""The tables of the three Markdown pages, from report/results/*.json and the checkpoints themselves.

    python report/build.py tables        fill them in again

A table stands between `<!-- NAME -->` and `<!-- end -->`, and is replaced whole. So no measured number in those files
is typed by hand, and a test can tell when one is out of date.
"""

import re

from figures import CHECKPOINTS, RESULTS, read_result
from image_data import DATASETS
from utils import ROOT, UserError
from weights import images_seen, read_checkpoint

PAGES = ("README.md", "BENCHMARKS.md", "checkpoints/README.md")


def table(header, rows):
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def quality_row(name, q):
    """A model's distance, beside what as many real images score, and how often its samples show what was asked for."""
    own = q["features"]["name"] == q["data"]  # another data set's floor says nothing about this one
    curve = read_result(f"sanity_{q['data']}")["curve"] if own else []
    floor = next((f"{point['mean']:.3f}" for point in curve if point["count"] == q["samples"]), "")
    agreement = f"{q['labels']['agreement']:.1%}" if "labels" in q else ""
    return [name, f"{q['frechet_distance']:.3f}", floor, agreement]


def results_table():
    """The models that ship: the grid's best and worst, longer trainings, guided and not."""
    from ddpm_unconditional import GRID

    grid = [row for row in read_result("grid")["runs"] if row["name"] in GRID]
    grid.sort(key=lambda row: row["quality"]["frechet_distance"])
    rows = []
    for which, row in (("best", grid[0]), ("worst", grid[-1])):
        experiment = row["name"].replace("_", ", ")
        rows.append(quality_row(f"Fashion-MNIST, the {which} of {len(grid)} experiments: {experiment}", row["quality"]))
    for path in sorted(RESULTS.glob("samples_*.json")):
        q = read_result(path.stem)
        rows.append(quality_row(f"{DATASETS[q['data']].title}, `{q['checkpoint']}`", q))
    for path in sorted(RESULTS.glob("sweep_*.json")):
        sweep = [row for row in read_result(path.stem)["rows"] if row["weights"] == "ema"]
        best = min(sweep, key=lambda row: row["quality"]["frechet_distance"])
        for row in sweep:
            if row["cfg_scale"] == 1 or row is best:
                guidance = "no guidance" if row["cfg_scale"] == 1 else f"`--cfg-scale {row['cfg_scale']:g}`"
                rows.append(quality_row(f"{DATASETS[row['quality']['data']].title}, {guidance}", row["quality"]))
    return table(["model", "Fréchet distance", "floor", "label agreement"], rows)


def accented(text):
    return text.replace("Frechet", "Fréchet")


def number(x):
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def speed_table():
    """The comparisons of speed, a table for each machine."""
    rows, parts = [row for row in read_result("benchmark")["rows"] if "gain" in row], []
    for machine in dict.fromkeys(row["machine"] for row in rows):
        lines, notes, here = [], [], [row for row in rows if row["machine"] == machine]
        for row in here:
            gain = row["gain"]
            turns = f" ({gain['min']:.3g} to {gain['max']:.3g})" if row["turns"] > 1 else ""
            sides = [f"{number(row[side]['median'])} {row['unit']}" for side in ("plain", "ours")]
            lines.append([accented(row["what"]), *sides, f"{gain['median']:.3g}{turns}"])
            notes += [f"- {row['what']}: {row['note']}"] if "note" in row else []
        header = ["what", "plain", "ours", "times better (lowest to highest)"]
        loads = [row["load_before"] for row in here]
        where = f"On {machine} (load average before the measurements: {min(loads):.1f} to {max(loads):.1f}):"
        parts += [where, table(header, lines), *(["\n".join(notes)] if notes else [])]
    return "\n\n".join(parts)


def samplers_table():
    """Frechet distance against sampler and steps."""
    rows = [row for row in read_result("benchmark")["rows"] if "samplers" in row]
    counts = sorted({int(steps) for row in rows for points in row["samplers"].values() for steps in points})
    lines = [
        [
            f"`{row['checkpoint']}`",
            sampler,
            *(f"{points[str(n)]['frechet_distance']:.2f}" if str(n) in points else "" for n in counts),
        ]
        for row in rows
        for sampler, points in row["samplers"].items()
    ]
    return table([accented(rows[0]["what"]), "sampler", *(f"{n} steps" for n in counts)], lines)


def reliability_lines():
    result = read_result("reliability")
    kill, disk, fuzz = result["kill"], result["disk_full"], result["fuzz"]
    train, other = disk["training"], disk["sample_publish_unpack"]
    survived = train["survived_and_resumed_to_the_same_bits"] + other["survived_with_nothing_half_written"]
    kills, inside = sum(kill["kills"].values()), kill["kills"]["inside a save"]
    same, finished = kill["runs_identical_to_the_unkilled"], kill["runs_finished"]
    unreadable, lost = kill["unreadable_states_or_checkpoints"], kill["saved_steps_lost"]
    moments, cases, refused = train["faults"] + other["faults"], fuzz["cases"], fuzz["refused_with_one_line"]
    bad = fuzz["tracebacks_hangs_half_written_or_outside"]
    return f"""- `{kill["command"]}`: training was killed {kills} times, {inside} of them in the middle of a save.
  {same} of {finished} finished runs ended with exactly the weights of the run that nobody killed.
  {unreadable} files could not be read, and {lost} saved steps were lost.
- `{disk["command"]}`: the disk was full at {moments} different moments.
  {survived} times nothing was lost or left half written.
- `{fuzz["command"]}`: {cases:,} commands with odd flags or damaged files.
  {refused:,} were refused with one clear line; {bad} ended in a traceback, a hang or a half-written file."""


def checkpoints_table():
    """Every published model: what it was trained on, for how long, and its numbers."""
    grid = {f"grid_{r['name']}": r["quality"] for r in (read_result("grid") or {"runs": []})["runs"]}
    rows = []
    for path in sorted(CHECKPOINTS.glob("*.safetensors")):
        if path.stem.startswith(("features_", "reference_")):
            continue
        tensors, config = read_checkpoint(path)
        kinds = sorted({name.split("/")[0] for name in tensors if "/" in name})
        train, diffusion = config["train"], config["diffusion"]
        seen = images_seen(train)
        how = f"{diffusion['schedule']}, {train['loss']}, T = {diffusion['timesteps']}" + (
            ", vlb" if diffusion.get("objective") == "vlb" else ""
        )
        q = grid.get(path.stem) or read_result(f"samples_{path.stem}")
        if sweep := read_result(f"sweep_{path.stem.removesuffix('_conditional')}"):
            q = q or min(
                (r["quality"] for r in sweep["rows"] if r["weights"] == "ema"), key=lambda q: q["frechet_distance"]
            )
        rows.append(
            [
                f"`{path.stem}`",
                DATASETS[config["data"]["name"]].title,
                how,
                f"{seen / 1e6:.2f} M ({seen / config['data']['images']:.3g} epochs)",
                str(train["seed"]),
                ", ".join(kinds),
                f"{path.stat().st_size / 1e6:.1f} MB",
                f"{q['frechet_distance']:.3f} ({q['samples']:,} samples)" if q else "",
            ]
        )
    return table(["file", "data", "diffusion", "images seen", "seed", "weights", "size", "Fréchet"], rows)


TABLES = {
    "results": results_table,
    "speed": speed_table,
    "samplers": samplers_table,
    "reliability": reliability_lines,
    "checkpoints": checkpoints_table,
}


def fill(text):
    """`text` with every table made anew. Raises UserError for a name that no table has."""

    def replace(match):
        if match[1] not in TABLES:
            raise UserError(f"there is no table {match[1]!r}: choose from {', '.join(TABLES)}")
        return f"<!-- {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", replace, text, flags=re.DOTALL)


def filled():
    """{page: its text with every table made anew}"""
    return {ROOT / page: fill((ROOT / page).read_text()) for page in PAGES}
