"""The tables of README.md and checkpoints/README.md, from report/results/*.json and the checkpoints themselves.

    python report/build.py tables        fill them in again

A table stands between `<!-- NAME -->` and `<!-- end -->`, and is replaced whole. So no measured number in those files
is typed by hand, and a test can tell when one is out of date.
"""

import re

from figures import CHECKPOINTS, RESULTS, read_result
from utils import ROOT, UserError
from weights import images_seen, read_checkpoint

PAGES = ("README.md", "checkpoints/README.md")
DATA = {"fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10", "landscapes": "landscapes"}
AIMS = {  # gains, or ours, set for a CPU with bfloat16 units
    "train_28": "2.5x",
    "train_course_32": "2.5x",
    "train_course_64": "2.5x",
    "train_course_64_memory": "3x",
    "sample": "20x",
    "train_default_share": "65 %",
    "train_course_32_share": "50 %",
    "guided": "60x",
    "data_fashion_mnist": "50x",
    "data_crops": "10x",
    "quality_minutes": "5x",
}


def table(header, rows):
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def quality_cells(q):
    interval = q["frechet_bootstrap"]["interval_95"]
    labels = q.get("labels")
    precision, recall = (q[name] + 1e-9 for name in ("precision", "recall"))  # 0.835 becomes 0.84, as in the report
    return [
        f"{q['frechet_distance']:.3f}",
        f"{interval[0]:.3f} to {interval[1]:.3f}",
        f"{precision:.2f}",
        f"{recall:.2f}",
        f"{labels['agreement'] + 1e-9:.1%}" if labels else "",
        f"{q['samples']:,}",
    ]


def results_table():
    """The models that ship, in a line each: the grid's best and worst, longer trainings, guided and not."""
    from ddpm_unconditional import GRID

    rows = []
    runs = sorted(
        (r for r in (read_result("grid") or {"runs": []})["runs"] if r["name"] in GRID),
        key=lambda r: r["quality"]["frechet_distance"],
    )
    for which, run in {"best": runs[:1], "worst": runs[1:][-1:]}.items():
        for r in run:
            schedule, loss = r["config"]["diffusion"]["schedule"], r["config"]["train"]["loss"]
            name = f"Fashion-MNIST, {which} of {len(runs)} experiments: {schedule}, {loss}"
            rows.append([name, *quality_cells(r["quality"])])
    for path in sorted(RESULTS.glob("samples_*.json")):
        result = read_result(path.stem)
        other = result["features"]["name"]
        note = f", in the features of {DATA[other]}" if other != result["data"] else ""
        rows.append([f"{DATA[result['data']]}, `{result['checkpoint']}`{note}", *quality_cells(result)])
    for path in sorted(RESULTS.glob("sweep_*.json")):
        sweep = read_result(path.stem)
        best = min((r for r in sweep["rows"] if r["weights"] == "ema"), key=lambda r: r["quality"]["frechet_distance"])
        for r in sweep["rows"]:
            note = ", its best scale" if r is best else ""
            if r["cfg_scale"] in (1, 3) or note:
                setting = f"{r['weights']} weights, `cfg_scale` {r['cfg_scale']:g}{note}"
                name = f"{DATA[r['quality']['data']]}, conditional, {setting}"
                rows.append([name, *quality_cells(r["quality"])])
    return table(["model", "Fréchet", "95% interval", "precision", "recall", "label agreement", "samples"], rows)


def features_table():
    rows = []
    for name in DATA:
        sanity = read_result(f"sanity_{name}")
        if sanity:
            _, facts = read_features(name)
            floors = [f"{p['mean']:.3f} at {p['count']:,}" for p in sanity["curve"] if p["count"] in (1000, 2000)]
            rows.append(
                [DATA[name], f"{facts['test_accuracy']:.2%}", str(sanity["features"]["dimensions"]), ", ".join(floors)]
            )
    return table(["classifier of", "test accuracy", "features", "the floor: as many training images"], rows)


def read_features(name):
    from weights import read_file

    return read_file(CHECKPOINTS / f"features_{name}.safetensors", "")


def work(row):
    """What a row of benchmark.json is about."""
    return row["what"].strip().replace("Frechet", "Fréchet")


def speed_table():
    """The comparisons on the machine of benchmark.json, and the gains on an earlier one, whose CPU has other units."""
    benchmark, earlier = read_result("benchmark"), read_result("benchmark_amd_epyc")
    rows, others = [], {row["name"]: row for row in earlier["rows"]}
    for row in benchmark["rows"]:
        if "gain" in row:
            value = [f"{number(row[side]['median'])} {row['unit']}".removesuffix(" FD") for side in ("plain", "ours")]
            gain = f"{row['gain']['median']:.3g}x"
            if row["turns"] > 1:
                gain += f" ({row['gain']['min']:.3g} to {row['gain']['max']:.3g})"
            other = others.get(row["name"])
            there = (
                ""
                if not other
                else f"{other['ours']['median']:.3g} %"
                if row["unit"] == "%"
                else f"{other['gain']['median']:.3g}x"
            )
            rows.append([work(row), *value, gain, AIMS.get(row["name"], ""), there])
    notes = "".join(
        f"\n- {work(row)}: {row['note']}"
        for row in benchmark["rows"]
        if row.get("unit") in ("s", "min") and "note" in row
    )
    header = ["work", "plain", "ours", "gain (min to max)", "aim", f"on an {earlier['machine']['cpu']}"]
    machine = benchmark["machine"]
    bfloat16 = "yes" if machine["bfloat16"] else "no"
    cpu = f"{machine['cpu']}, {machine['cores']} cores, {machine['instructions']}, bfloat16 {bfloat16}"
    growth = [
        [row["what"], ", ".join(f"{x}: {point['median']:.3g} s" for x, point in row["points"].items())]
        for row in benchmark["rows"]
        if row["name"].startswith("growth_")
    ]
    return "\n\n".join(
        [
            table(header, rows) + f"\n{notes}",
            table(["how ours grows (medians)", "against: seconds"], growth),
            f"Measured on: {cpu}, torch {machine['torch']}.",
        ]
    )


def number(x):
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def speed_change(tried, what):
    return f"{tried['points']['as it is']['median'] / tried['points'][what]['median'] - 1:+.0%}"


def tried_table():
    """What was tried for speed and for the network's shape, from the rows of benchmark.json that are no comparisons."""
    rows = {row["name"]: row for row in read_result("benchmark")["rows"]}
    parts = []
    if tried := rows.get("tried"):
        earlier = read_result("benchmark_amd_epyc")
        there = next(row for row in earlier["rows"] if row["name"] == "tried")
        lines = [
            [what, f"{point['median']:.3f} s", speed_change(tried, what), speed_change(there, what)]
            for what, point in tried["points"].items()
        ]
        parts.append(
            table(
                ["a training step of Point 1's network", "median", "speed", f"on an {earlier['machine']['cpu']}"], lines
            )
        )
    if shapes := rows.get("shapes"):
        lines = [
            [
                s["shape"],
                f"{s['parameters']:,}",
                f"{s['images_per_second']:.0f}",
                f"{s['steps']:,}",
                f"{s['frechet_distance']:.2f}",
            ]
            for s in sorted(shapes["shapes"], key=lambda s: s["frechet_distance"])
        ]
        parts.append(table([shapes["what"], "parameters", "images/s", "steps", "Fréchet"], lines))
    if compared := [row for name, row in rows.items() if name.startswith("samplers_")]:
        counts = sorted({int(steps) for row in compared for points in row["samplers"].values() for steps in points})
        lines = [
            [
                f"`{row['checkpoint']}`",
                f"`{sampler}`",
                *(f"{points[str(n)]['frechet_distance']:.2f}" if str(n) in points else "" for n in counts),
            ]
            for row in compared
            for sampler, points in row["samplers"].items()
        ]
        parts.append(table([work(compared[0]), "sampler", *map(str, counts)], lines))
    return "\n\n".join(parts) or "Not measured yet: `python benchmark.py --only tried shapes`."


def reliability_lines():
    r = read_result("reliability")
    kill, disk, fuzz = r["kill"], r["disk_full"], r["fuzz"]
    train, other = disk["training"], disk["sample_publish_unpack"]
    survived = train["survived_and_resumed_to_the_same_bits"] + other["survived_with_nothing_half_written"]
    finished, same = kill["runs_finished"], kill["runs_identical_to_the_unkilled"]
    kills, inside = sum(kill["kills"].values()), kill["kills"]["inside a save"]
    unreadable, lost = kill["unreadable_states_or_checkpoints"], kill["saved_steps_lost"]
    cases, refused = fuzz["cases"], fuzz["refused_with_one_line"]
    return (
        f"- `{kill['command']}`: {kills} kills, {inside} of them inside a save: {same} of {finished} finished runs have "
        f"the bits of the unkilled one, {unreadable} unreadable files, {lost} saved steps lost.\n"
        f"- `{disk['command']}`: the disk was full at {train['faults'] + other['faults']} moments; "
        f"{survived} times nothing was lost or half-written.\n"
        f"- `{fuzz['command']}`: {cases:,} cases of odd flags and damaged files, {refused:,} refused with one line; "
        "tracebacks, hangs, half-written outputs, files in wrong places: "
        f"{fuzz['tracebacks_hangs_half_written_or_outside']}."
    )


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
                DATA.get(config["data"]["name"], ""),
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
    "features": features_table,
    "speed": speed_table,
    "tried": tried_table,
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
