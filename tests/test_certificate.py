"A model on its way: the same in another process, and five mistakes that load without an error."

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from adaptkit.cli import app
from adaptkit.core.registry import AdaptkitError
from adaptkit.data.datasets import Samples
from adaptkit.data.sources import load_data
from adaptkit.data.texts import Texts, strings
from adaptkit.deployment.certificate import (
    EXACT,
    ROUNDED,
    Witness,
    certify,
    far_witness,
    halved,
    judged,
    pack_samples,
    unpack_samples,
    witness,
)
from adaptkit.heads.heads import Named, build_model, save_model
from adaptkit.testing import toy_data
from adaptkit.training.finetune import FineTune
from adaptkit.training.loop import fit
from adaptkit.training.plan import Plan

@pytest.fixture(scope="module")
def data():
    return toy_data(24)


@pytest.fixture(scope="module")
def model(data):
    made = build_model("mobile_tiny", data, size=18, seed=3)
    with torch.no_grad():
        made.head[-1].weight.mul_(20)  # far enough from zero for answers to differ
        for name, value in made.named_buffers():
            value.add_(0.3 if "running" in name else 0)  # as if it had learnt
    return made.eval()


@pytest.fixture(scope="module")
def before(model, data) -> Witness:
    return witness(model, data.test)


def test_a_witness_is_what_the_model_says_and_leaves_it_alone(model, data) -> None:
    model.train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    found = witness(model, data.test)
    assert model.training and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    model.eval()
    x = torch.cat([data.test.load([i], model.reader) for i in range(len(data.test))]).float() / 255
    with torch.no_grad():
        assert np.allclose(found.said.logits, model(x).numpy(), atol=1e-4)
    assert Witness.from_json(json.loads(json.dumps(found.to_json()))).said.logits.tolist() == found.said.logits.tolist()


def test_samples_of_every_kind_come_back(tmp_path: Path, data) -> None:
    files = []
    for i in range(3):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(np.full((19 + i, 17, 3), 40 * i, np.uint8)).save(files[-1])
    labels = np.array([0, 1, 0])
    for k, samples in enumerate((data.test, Samples(files, labels), Texts(strings(["a", "bé", "很好"]), labels))):
        place = tmp_path / str(k)
        place.mkdir()
        pack_samples(samples, place)
        back = unpack_samples(place)
        assert type(back) is type(samples) and back.labels.tolist() == samples.labels.tolist()
        if samples.kind == "text":
            assert [back.text(i) for i in range(3)] == [samples.text(i) for i in range(3)]
        else:
            assert all((back.image(i) == samples.image(i)).all() for i in range(len(samples)))


def test_another_process_says_the_same(model, before, data, tmp_path: Path) -> None:
    step = judged("far", before, far_witness(save_model(model, tmp_path), data.test))
    assert step.passed and step.gap < 1e-5 and step.flipped == 0 and step.n == len(data.test)


def test_what_the_other_process_says_last_is_told(data, tmp_path: Path) -> None:
    with pytest.raises(AdaptkitError, match=r"can't be asked in a new process: Cannot read .*model\.json"):
        far_witness(tmp_path / "nowhere", data.test)


def changed(model, **how):
    other = copy.deepcopy(model)
    for name, value in how.items():
        setattr(other, name, value)
    return other


def without(model, part: str):
    other = build_model("mobile_tiny", Named(model.classes), size=18, seed=8)
    other.load_state_dict({k: v for k, v in model.state_dict().items() if part not in k}, strict=False)
    return other.eval()


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda m: without(m, "running"), "running_mean"),
        (lambda m: without(m, "head."), "head."),
        (lambda m: changed(m, classes=m.classes[::-1]), "another order"),
        (lambda m: changed(m, classes=tuple(f"{c}2" for c in m.classes)), "are others"),
        (lambda m: changed(m, preprocess={**m.preprocess, "fit": "crop"}), "fit is 'crop', not 'squash'"),
        (lambda m: copy.deepcopy(m).to(torch.bfloat16).float(), "tensors are others"),
    ],
)
def test_each_mistake_fails_and_says_why(spoil, told: str, model, before, data) -> None:
    step = judged("step", before, witness(spoil(model), data.test))
    assert not step.passed and any(told in c for c in step.changed)


def test_a_flip_fails_an_exact_step_and_few_are_let_through_when_rounded(before) -> None:
    logits = before.said.logits.copy()
    top = np.argsort(logits[0])[::-1]
    logits[0, top[1]] = logits[0, top[0]] + 1e-6  # one answer, by a hair
    after = dataclasses.replace(before, said=dataclasses.replace(before.said, logits=logits))
    step = judged("step", before, after, allowed=ROUNDED)
    assert step.flipped == 1 and step.passed == (0.01 * step.n >= 1 and step.gap <= ROUNDED)
    assert not judged("step", before, after).passed
    near = dataclasses.replace(before, said=dataclasses.replace(before.said, logits=before.said.logits * (1 + 1e-3)))
    assert judged("step", before, near).gap == pytest.approx(1e-3, rel=1e-2) and not judged("step", before, near).passed
    assert judged("step", before, near, allowed=ROUNDED).passed and EXACT < ROUNDED


def test_half_precision_rounds_and_the_model_stays(model) -> None:
    state = {k: v.clone() for k, v in model.state_dict().items()}
    other = halved(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    for k, v in other.state_dict().items():
        assert torch.equal(v, state[k].half().to(v.dtype) if v.is_floating_point() else state[k])


def test_runs_are_certified_images_and_texts(tmp_path: Path) -> None:
    plan = Plan(epochs=1, batch_size=32, views=1, accelerator="cpu")
    for name, backbone, size in (("digits", "small_cnn", 18), ("support_topics", "bag_of_embeddings", 16)):
        data = load_data(name)
        run = fit(build_model(backbone, data, size=size), data, FineTune(depth=1), plan=plan, out=tmp_path / name, observers=[], cache=tmp_path / "cache")
        done = CliRunner().invoke(app, ["certify", str(run.folder), "-n", "40"])
        assert done.exit_code == 0 and "in a new process" in done.output and "FAILED" not in done.output, done.output
        stored = json.loads((run.folder / "certificate.json").read_text())
        assert stored["passed"] and [s["n"] for s in stored["steps"]] == [40] * 4
    other = certify(run, model=build_model("bag_of_embeddings", data, size=16, seed=9), n=40)
    assert [step.passed for step in other.steps][:2] == [True, False]  # the folder holds another model
    with pytest.raises(AdaptkitError, match="not a run folder"):
        certify(tmp_path)
    with pytest.raises(AdaptkitError, match="train"):
        certify(tmp_path / "digits", split="vaild")
