"Compiled steps: the same run up to rounding, the same names, the same bits after a crash; and a sentence where the tools are missing."

from __future__ import annotations

import dataclasses
import math
import sysconfig

import numpy as np
import pytest
import torch

from adaptkit.core.registry import AdaptkitError
from adaptkit.data.datasets import Data, Source
from adaptkit.data.images import Augment
from adaptkit.data.texts import Texts
from adaptkit.heads.heads import build_model
from adaptkit.training.compile import CompileCost, break_even, check_compiler, measure_compile, steps_only
from adaptkit.training.control import When
from adaptkit.training.finetune import FineTune
from adaptkit.training.loop import fit
from adaptkit.training.session import Plan, fingerprint, request_of

PLAN = Plan(epochs=2, batch_size=8, views=1, augment=Augment(hflip=False), accelerator="cpu", checkpoint_every=4)
COMPILED = dataclasses.replace(PLAN, compile=True)
TUNE = FineTune(depth=1, rate=1e-2, head_rate=1e-2)


pytestmark = pytest.mark.usefixtures("own_cache")


def test_break_even_is_where_the_lines_cross():
    rng = np.random.default_rng(0)
    for price, eager, compiled in rng.uniform(0.01, 10, (100, 3)):
        steps = break_even(price, eager, compiled)
        if compiled >= eager:
            assert steps == math.inf
        else:
            assert steps * eager >= price + steps * compiled - 1e-9
            assert (steps - 1) * eager < price + (steps - 1) * compiled


def test_the_option_changes_the_request_only_where_it_is_used(data, model):
    asked = [request_of(model, data, TUNE, plan) for plan in (PLAN, dataclasses.replace(PLAN, compile=False), COMPILED)]
    assert asked[0] == asked[1] != asked[2]


def test_no_compiler_is_a_sentence_and_nothing_is_begun(data, model, tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AdaptkitError, match=r"needs the C\+\+ compiler .*install it .*compile=False"):
        fit(model, data, TUNE, plan=COMPILED, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_header_files_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(AdaptkitError, match="no .*Python.h: install"):
        check_compiler()


def test_only_calls_that_ask_for_gradients_are_compiled():
    seen = []

    def backend(graph, inputs):
        seen.append(len(inputs))
        return graph

    net = steps_only(torch.compile(torch.nn.Linear(3, 2), backend=backend))
    with torch.no_grad():
        net(torch.ones(4, 3))
    assert seen == []
    net(torch.ones(4, 3))
    net(torch.ones(4, 3))
    assert len(seen) == 1


class PowerCut:
    "Raises after so many batches."

    on = (When.STEP,)

    def __call__(self, event):
        if event.step == 9:
            raise RuntimeError("power cut")


@pytest.mark.slow
def test_a_compiled_run(data, model, tmp_path):
    plain = fit(model, data, TUNE, plan=PLAN, observers=[], out=tmp_path / "plain")
    whole = fit(model, data, TUNE, plan=COMPILED, observers=[], out=tmp_path / "whole")
    assert [e["loss"] for e in whole.events] == pytest.approx([e["loss"] for e in plain.events], rel=1e-4)
    assert list(whole.model.state_dict()) == list(model.state_dict()) and whole.record["plan"]["compile"]
    with pytest.raises(RuntimeError):
        fit(model, data, TUNE, plan=COMPILED, observers=[PowerCut()], out=tmp_path / "cut")
    with pytest.raises(AdaptkitError, match="other data, model, method or plan"):
        fit(model, data, TUNE, plan=PLAN, observers=[], out=tmp_path / "cut", exists="resume")
    torch.compiler.reset()  # as a new process would begin
    again = fit(model, data, TUNE, plan=COMPILED, observers=[], out=tmp_path / "cut", exists="resume")
    assert fingerprint(again.model) == fingerprint(whole.model)
    assert [e["loss"] for e in again.events] == [e["loss"] for e in whole.events]


@pytest.mark.slow
def test_texts_of_all_lengths(tmp_path):
    def some(rows, seed):
        rng = np.random.default_rng(seed)
        words = [["bad", "good"][i % 2] for i in range(rows)]
        return Texts([" ".join(["so"] * int(rng.integers(1, 40)) + [w, str(seed), str(i)]) for i, w in enumerate(words)], np.arange(rows) % 2)

    data = Data("words", ("bad", "good"), some(64, 0), some(16, 1), some(16, 2), Source("words", "Apache-2.0", "made up"), 0)
    model = build_model("bag_of_embeddings", data, seed=0)
    plan, tune = Plan(epochs=2, batch_size=8, accelerator="cpu"), FineTune(depth=1)
    torch._dynamo.utils.counters.clear()
    plain, fast = (fit(model, data, tune, plan=dataclasses.replace(plan, compile=on), observers=[], out=tmp_path / str(on)) for on in (False, True))
    assert [e["loss"] for e in fast.events] == pytest.approx([e["loss"] for e in plain.events], rel=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4  # not one for each length


@pytest.mark.slow
def test_the_measurement_is_of_the_same_run(data, model):
    cost = measure_compile(model, data, TUNE, PLAN)
    assert cost.measured == 12 and cost.apart < 1e-4 and cost.seconds > cost.compiled > 0
    assert cost.steps == break_even(cost.seconds, cost.eager, cost.compiled) and "12 steps" in repr(cost)


def test_the_picture_says_where_it_pays():
    cost = CompileCost(40.0, 0.05, 0.025, 0.0, 10)
    assert "1,600 steps" in cost.show().axes[0].get_title()
    assert "doesn't pay" in dataclasses.replace(cost, compiled=0.06).show().axes[0].get_title()
