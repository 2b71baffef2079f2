"""The tables of the three Markdown pages, from report/results/*.json and the checkpoints themselves.

A table stands between `<!-- NAME -->` and `<!-- end -->`, and `python report/build.py tables` replaces it whole. So no
number in those tables is typed by hand, and a test can tell when one is out of date.
"""

import re

from ddpm import SAMPLERS
from ddpm_unconditional import GRID
from figures import CHECKPOINTS, guided_rows, read_result, table
from image_data import DATASETS
from utils import ROOT
from weights import images_seen, read_checkpoint


def distance(row):
    return row["quality"]["frechet_distance"]


def quality_row(model, q):
    """A model's distance, beside what as many real images score, and how often its samples show what was asked for."""
    own = q["features"]["name"] == q["data"]  # another data set's floor says nothing about this one
    curve = read_result(f"sanity_{q['data']}")["curve"] if own else []
    floor = next((f"{point['mean']:.3f}" for point in curve if point["count"] == q["samples"]), "")
    agreement = f"{q['labels']['agreement'] + 1e-9:.1%}" if "labels" in q else ""  # halves go up, as in the report
    return [model, f"{q['frechet_distance']:.3f}", floor, agreement]


def results():
    """The models that ship: the grid's best and worst, longer trainings, guided and not."""
    grid = sorted((row for row in read_result("grid")["runs"] if row["name"] in GRID), key=distance)
    rows = []
    for which, row in (("best", grid[0]), ("worst", grid[-1])):
        rows.append(quality_row(f"`grid_{row['name']}`, {which} of seed 0's {len(grid)} experiments", row["quality"]))
    conditional = ("fashion_mnist_conditional", "cifar10_conditional", "cifar10_conditional_long", "cifar10_course")
    for name in ("fashion_mnist", *conditional, "landscapes"):
        if q := read_result(f"samples_{name}"):
            rows.append(quality_row(f"`{name}`", q))
            continue
        measured = guided_rows(name.replace("_conditional", ""))
        inside = [row for row in measured if row.get("cfg_interval")]
        plain = [row for row in measured if not row.get("cfg_interval")]
        unguided = [row for row in plain if row["cfg_scale"] == 1]
        for row in [min(some, key=distance) for some in (unguided, plain, inside) if some]:
            where = f" --cfg-interval {' '.join(map(str, row['cfg_interval']))}" if row.get("cfg_interval") else ""
            guidance = f"`--cfg-scale {row['cfg_scale']:g}{where}`" if row["cfg_scale"] != 1 else "no guidance"
            steps = f", {row['steps']} steps" if row["steps"] != SAMPLERS["dpm"].steps else ""
            rows.append(quality_row(f"`{name}`, {guidance}{steps}", row["quality"]))
    return table(["model", "Fréchet distance", "floor", "label agreement"], rows).data


def speed():
    """The comparisons of speed, a table for each machine."""
    machines = {}
    for row in read_result("benchmark")["rows"]:
        if "gain" in row:
            note = f" ({row['note']})" if "note" in row else ""
            sides = [f"{row[side]['median']:.3g} {row['unit']}" for side in ("plain", "ours")]
            better = "{median:.3g} ({min:.3g} to {max:.3g})".format(**row["gain"])
            cells = [row["what"] + note, *sides, better, f"{row['load_before']:.1f}"]
            machines.setdefault(row["machine"], []).append(cells)
    heads = ["what", "plain", "ours", "times better (lowest to highest)", "load before"]
    return "\n\n".join(f"On {machine}:\n\n{table(heads, rows).data}" for machine, rows in machines.items())


def samplers():
    """Fréchet distance of the best network's samples against sampler and steps."""
    result = next(row for row in read_result("benchmark")["rows"] if "samplers" in row)
    lines, counts = [], list(result["samplers"]["ddpm"])
    for sampler, points in result["samplers"].items():
        lines.append([sampler, *(f"{points[n]['frechet_distance']:.2f}" if n in points else "" for n in counts)])
    return table([f"{result['what']}, by sampler", *(f"{n} steps" for n in counts)], lines).data


def reliability():
    """What the stress tests did and saw."""
    kill, disk, fuzz = (read_result("reliability")[test] for test in ("kill", "disk_full", "fuzz"))
    train, other = disk["training"], disk["sample_publish_unpack"]
    survived = train["survived_and_resumed_to_the_same_bits"] + other["survived_with_nothing_half_written"]
    return f"""- `{kill["command"]}`: training was killed {sum(kill["kills"].values())} times,
  {kill["kills"]["inside a save"]} of them in the middle of a save. {kill["runs_identical_to_the_unkilled"]} of
  {kill["runs_finished"]} finished runs ended with exactly the weights of the run that nobody killed.
  {kill["unreadable_states_or_checkpoints"]} files could not be read; {kill["saved_steps_lost"]} saved steps were lost.
- `{disk["command"]}`: the disk was full at {train["faults"] + other["faults"]} different moments.
  {survived} times nothing was lost or left half written.
- `{fuzz["command"]}`: of {fuzz["cases"]:,} commands with odd flags or damaged files,
  {fuzz["refused_with_one_line"]:,} were refused with one clear line, {fuzz["accepted"]} made sense and ran, and
  {fuzz["tracebacks_hangs_half_written_or_outside"]} ended in a traceback, a hang or a half-written file."""


def measured(stem):
    """What is known of a checkpoint's samples: by themselves, or with the best guidance; None where nothing is."""
    rows = [row for row in read_result("grid")["runs"] if f"grid_{row['name']}" == stem]
    rows = rows or guided_rows(stem.replace("_conditional", ""))
    return read_result(f"samples_{stem}") or (min(rows, key=distance)["quality"] if rows else None)


def checkpoints():
    """Every published model: what it was trained on, for how long, and its numbers."""
    rows = []
    for path in sorted(CHECKPOINTS.glob("*.safetensors")):
        if path.stem.startswith(("features_", "reference_")):
            continue
        tensors, config = read_checkpoint(path)
        train, diffusion, data = config["train"], config["diffusion"], config["data"]
        how = f"{diffusion['schedule']}, {train['loss']}, T = {diffusion['timesteps']}"
        how += ", vlb" if diffusion.get("objective") == "vlb" else ""
        how += ", t drawn by vlb" if train.get("timestep_sampling") == "vlb" else ""
        seen = images_seen(train)
        epochs = f"{seen / 1e6:.2f} M ({seen / data['images']:.3g} epochs)"
        kinds = ", ".join(sorted({name.split("/")[0] for name in tensors if "/" in name}))
        what = [f"`{path.stem}`", DATASETS[data["name"]].title, how, epochs, train["seed"], kinds]
        q = measured(path.stem)
        reached = f"{q['frechet_distance']:.3f} ({q['samples']:,} samples)" if q else ""
        rows.append([*what, f"{path.stat().st_size / 1e6:.1f} MB", reached])
    return table(["file", "data", "diffusion", "images seen", "seed", "weights", "size", "Fréchet"], rows).data


def search():
    """What was tried before the long trainings, in equal minutes, whether it paid or not; the seeds side by side."""
    trials: dict = {}
    for data in ("fashion_mnist", "cifar10"):
        for row in read_result(f"search_{data}")["rows"]:
            trials.setdefault((DATASETS[data].title, row["what"]), []).append(row)
    rows = []
    for what, seeds in trials.items():
        size, steps = f"{seeds[0]['parameters'] / 1e6:.1f} M", ", ".join(str(row["steps"]) for row in seeds)
        noise = ", ".join(f"{row['noise_error']:.4f}" for row in seeds)
        reached = ", ".join(f"{distance(row):.2f}" for row in seeds)
        error = max(row["quality"]["frechet_bootstrap"]["standard_error"] for row in seeds)
        rows.append([*what, size, steps, noise, f"{reached} (± {error:.2f})"])
    return table(["data", "what", "parameters", "steps", "noise error", "Fréchet"], rows).data


TABLES = {make.__name__: make for make in (results, speed, samplers, reliability, checkpoints, search)}


def filled():
    """{page: its text with every table made anew}"""

    def replace(match):
        contents = TABLES[match[1]]().replace("Frechet", "Fréchet")  # results are plain ASCII
        return f"<!-- {match[1]} -->\n{contents}\n<!-- end -->"

    tables = re.compile(rf"<!-- ({'|'.join(TABLES)}) -->\n.*?<!-- end -->", re.DOTALL)
    pages = [ROOT / page for page in ("README.md", "BENCHMARKS.md", "checkpoints/README.md")]
    return {page: tables.sub(replace, page.read_text()) for page in pages}
