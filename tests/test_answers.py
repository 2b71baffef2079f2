"""The homework's answers are on the path: whoever disturbs one sees the right things change, and nothing else."""

import re

import pytest
import torch
from conftest import ROOT, randomise, tiny_config

import ddpm
import ddpm_conditional
import modules
import training
from ddpm import Diffusion
from evaluate import variational_bound
from utils import to_model
from weights import build_model, read_checkpoint

LABELS = torch.tensor([0, 1, 1])
SEES_LABELS = {"losses", "average", "guided"}
SAMPLES = {"ddpm", "ddim", "dpm", "guided"}
EVERYTHING = {"losses", "average", "bound"} | SAMPLES


def halved(function):
    return lambda *args, **options: function(*args, **options) / 2


def halved_mean(q_posterior):
    def disturbed(*args):
        mean, variance = q_posterior(*args)
        return mean / 2, variance

    return disturbed


def no_noise(draw_batch):
    def disturbed(*args):
        x0, t, noise, labels = draw_batch(*args)
        return x0, t, torch.zeros_like(noise), labels

    return disturbed


def swapped(q_sample):
    return lambda diffusion, x0, t, noise: q_sample(diffusion, noise, t, x0)


def ends_at_once(sampler):
    def disturbed(*args, **options):
        yield next(sampler(*args, **options))

    return disturbed


def halved_rows(label_embedding):
    class Halved(torch.nn.Embedding):
        def forward(self, labels):
            return super().forward(labels) / 2

    return lambda num_classes, dim: Halved(num_classes, dim) if num_classes else None


def swapped_predictions(guided):
    return lambda model, labels=None, *args: guided(model, None if labels is None else -1 - labels, *args)


# answer: where it is, a way to disturb it, and all that must change
ANSWERS = {
    "455": (ddpm.SCHEDULES, "cosine", halved, EVERYTHING),
    "506": (Diffusion, "q_posterior", halved_mean, {"ddpm", "bound"}),
    "556": (training, "draw_batch", no_noise, {"losses", "average"}),
    "563": (Diffusion, "q_sample", swapped, {"losses", "average", "bound"}),
    "750 and 758": (ddpm, "ddpm_sampler", ends_at_once, {"ddpm"}),
    "the one prediction of x0": (Diffusion, "predict_x0", halved, SAMPLES | {"bound"}),
    "215": (modules, "label_embedding", halved_rows, SEES_LABELS),
    "232": (modules, "add_labels", lambda _: lambda emb, *_: emb, SEES_LABELS),
    "89-94": (training, "drop_labels", lambda _: lambda labels, *_: labels, {"losses", "average"}),
    "51": (ddpm_conditional, "guided", swapped_predictions, {"guided"}),
    "EMA 7-32": (modules.EMA, "update_model_average", lambda _: lambda *_: None, {"average"}),
}


def outcomes(data, folder):
    """What a student sees: a short run's losses and average, a fixed network's samples and its bound."""
    config = tiny_config(steps=6, ema_start=2, ema_betas=[0.5], p_uncond=0.5)
    tensors, _ = read_checkpoint(training.train(config, data, folder))
    model = randomise(build_model(config["model"]), scale=0.1)
    diffusion, shape, seen = Diffusion(20, "cosine"), (1, 8, 8), {}
    for sampler in ddpm.SAMPLERS:
        seen[sampler] = diffusion.sample(model, 3, shape, sampler=sampler, steps=10)
    batches = diffusion.sample_batches(ddpm_conditional.predictor(model, LABELS, 3.0), 3, shape, steps=10)
    bound = variational_bound(model, diffusion, to_model(data.images[:4]))["bits_per_dim"]
    average = torch.cat([tensor.flatten() for name, tensor in sorted(tensors.items()) if name.startswith("ema")])
    return seen | {"guided": next(batches), "bound": bound, "losses": tensors["losses"], "average": average}


@pytest.fixture(scope="module")
def undisturbed(tiny_data, tmp_path_factory):
    return outcomes(tiny_data, tmp_path_factory.mktemp("undisturbed"))


def test_nothing_changes_by_itself(undisturbed, tiny_data, tmp_path):
    assert changed(undisturbed, outcomes(tiny_data, tmp_path)) == set()


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_disturbed_answer_is_seen(answer, undisturbed, tiny_data, tmp_path, monkeypatch):
    where, name, disturb, expected = ANSWERS[answer]
    if isinstance(where, dict):
        monkeypatch.setitem(where, name, disturb(where[name]))
    elif name == "ddpm_sampler":
        row = ddpm.SAMPLERS["ddpm"]
        monkeypatch.setitem(ddpm.SAMPLERS, "ddpm", row._replace(function=disturb(row.function)))
    else:
        monkeypatch.setattr(where, name, disturb(getattr(where, name)))
    assert changed(undisturbed, outcomes(tiny_data, tmp_path)) == expected


def changed(before, after):
    return {name for name in before if not torch.equal(torch.as_tensor(before[name]), torch.as_tensor(after[name]))}


TODOS = dict.fromkeys(["455", "506", "556", "563", "582", "611", "750 and 758", "876", "215", "232", "51"], 1)
TODOS["89-94"] = 2  # the labels that are dropped, and the step of the loop


@pytest.mark.parametrize("number", TODOS)
def test_grep_finds_every_todo(number):
    """`grep -n "Homework TODO 506" *.py` names the place: a comment, and the answer right below it."""
    marked = re.compile(rf"^ *# Homework TODO {number}: .+\n(?: *#.*\n)* *\S", re.MULTILINE)
    assert sum(len(marked.findall(path.read_text())) for path in ROOT.glob("*.py")) == TODOS[number]
