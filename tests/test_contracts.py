"Every plugin of ours passes the contract that others' plugins have to pass; broken ones don't."

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from adaptkit.core import registry
from adaptkit.core.registry import AdaptkitError
from adaptkit.data.sources import load_data
from adaptkit.evaluation.metrics import METRICS
from adaptkit.heads.heads import HEADS, build_model
from adaptkit.models.backbones import BACKBONES, load_backbone
from adaptkit.testing import check_backbone, check_data_source, check_head, check_method, check_metric, toy_data
from adaptkit.training.finetune import FineTune
from adaptkit.training.methods import METHODS

def with_batchnorm(data):
    "AdvProp splits BatchNorm layers; the toy network has none."
    return build_model(load_backbone("efficientnet_lite0", pretrained=False, size=32), data, seed=0)


@pytest.mark.parametrize("name", list(METHODS))
def test_methods(name):
    data = toy_data()
    check_method(METHODS[name](), data=data, model=with_batchnorm(data) if name == "advprop" else None)


@pytest.mark.parametrize("name", list(BACKBONES))
def test_backbones(name):
    check_backbone(load_backbone(name, size=64))


@pytest.mark.parametrize("name", list(HEADS))
def test_heads(name):
    check_head(name)


class Gossip(torch.nn.Module):
    "Lets the images of a batch talk to each other."

    def __init__(self, width, classes):
        super().__init__()
        self.layer = torch.nn.Linear(width, classes)

    def forward(self, x):
        return self.layer(x.mean((2, 3)) - x.mean((0, 2, 3)))


class Sleeper(Gossip):
    "Owns a weight that it never uses."

    def __init__(self, width, classes):
        super().__init__(width, classes)
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.layer(x.mean((2, 3)))


@pytest.mark.parametrize("head, words", [(Gossip, "neighbours"), (Sleeper, "unused get no gradient")])
def test_broken_heads_are_caught(head, words, monkeypatch):
    monkeypatch.setitem(HEADS.items, "broken", head)
    with pytest.raises(AdaptkitError, match=words):
        check_head("broken")


def test_a_plugin_of_another_package_is_found(monkeypatch):
    from importlib import metadata

    entry = metadata.EntryPoint("theirs", "adaptkit.heads.layers:linear_head", "adaptkit.head")
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry] if group == "adaptkit.head" else [])
    try:
        assert "theirs" in HEADS and "theirs" in list(HEADS)
        check_head("theirs")
    finally:
        HEADS.items.pop("theirs", None)


@pytest.mark.parametrize("name", list(METRICS))
def test_metrics(name):
    check_metric(METRICS[name])


@pytest.mark.parametrize("name", ["digits", "elpv"])
def test_data_sources_that_are_here(name):
    check_data_source(lambda: load_data(name))


class Lazy(FineTune):
    "Takes no step."

    def step(self, model, optimizer):
        pass


class Leaky(FineTune):
    "Moves a frozen weight."

    def step(self, model, optimizer):
        optimizer.step()
        with torch.no_grad():
            next(model.backbone.parameters()).add_(0.01)


class Forgetful(FineTune):
    "Throws the head away at the end."

    def finish(self, model):
        for p in model.head.parameters():
            p.data.zero_()
        return model


class Moody(FineTune):
    "Uses random numbers of its own."

    def loss(self, network, batch):
        return {"noise": super().loss(network, batch)["cross-entropy"] * float(1 + 0.1 * np.random.default_rng().random())}


@pytest.mark.parametrize("method, words", [(Lazy(), "doesn't fall"), (Leaky(depth=0), "moved all the same"), (Forgetful(head_rate=1e-2), "finish changes"), (Moody(head_rate=1e-2), "same seed differ")])
def test_broken_methods_are_caught(method, words):
    with pytest.raises(AdaptkitError, match=words):
        check_method(method)


def test_a_broken_backbone_is_caught():
    backbone = load_backbone("small_cnn", size=32)
    backbone.source = dataclasses.replace(backbone.source, licence="")
    with pytest.raises(AdaptkitError, match="lacks origin or licence"):
        check_backbone(backbone)


def test_broken_data_are_caught():
    data = toy_data(24)
    with pytest.raises(AdaptkitError, match="has the labels"):
        check_data_source(lambda: dataclasses.replace(data, classes=("dark", "bright", "missing")))
    seeds = iter(range(9))
    with pytest.raises(AdaptkitError, match="two fingerprints"):
        check_data_source(lambda: toy_data(24, seed=next(seeds)))


@pytest.mark.parametrize("metric", [lambda p: 0.5, lambda p: float(p.predicted[0] == p.labels[0]), lambda p: 1.0])
def test_broken_metrics_are_caught(metric):
    with pytest.raises(AdaptkitError):
        check_metric(metric)
