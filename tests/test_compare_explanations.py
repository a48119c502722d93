"Maps of several models: likeness against scipy, chance, models that read in their own way, and what is refused."

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from adaptkit.core.registry import AdaptkitError
from adaptkit.explanation.compare import by_chance, coarse_likeness, compare_chain, compare_explanations
from adaptkit.explanation.explain import explain, subject
from adaptkit.heads.heads import build_model
from adaptkit.robustness.measuring import traces
from adaptkit.testing import toy_data

def maps(seed: int, n: int = 4, h: int = 16, w: int = 16) -> torch.Tensor:
    return torch.randn(n, h, w, generator=torch.Generator().manual_seed(seed)).round(decimals=1)  # with ties


def test_likeness_is_spearman_with_ties_and_any_sizes() -> None:
    a, b = maps(0), maps(1) + maps(0)
    theirs = [spearmanr(x.flatten(), y.flatten()).statistic for x, y in zip(a, b, strict=True)]
    assert coarse_likeness(a, b).numpy() == pytest.approx(theirs, abs=1e-9)
    doubled = b.repeat_interleave(2, 1).repeat_interleave(3, 2)  # [4, 32, 48]
    assert coarse_likeness(a, doubled).numpy() == pytest.approx(theirs, abs=1e-6)


def test_chance_is_the_mean_over_other_images() -> None:
    a, b = maps(0), maps(1)
    for i in range(4):
        others = [spearmanr(a[i].flatten(), b[j].flatten()).statistic for j in range(4) if j != i]
        assert float(by_chance(a, b)[i]) == pytest.approx(np.mean(others), abs=1e-9)


def test_a_model_compared_with_itself_is_alike_and_stays_as_it_was() -> None:
    net, x = subject()
    before = traces(net)
    found = compare_explanations(net, net, x, method="inputxgradient")
    assert found.likeness["after"].numpy() == pytest.approx(np.ones(4)) and traces(net) == before
    assert list(found.maps) == ["before", "after"] and "by chance" in repr(found)
    assert bool(compare_explanations(net, net, x[:1], method="gradient").chance["after"].isnan().all())


def test_all_are_asked_for_what_the_last_one_says() -> None:
    (net, x), (other, _) = subject(), subject()
    with torch.no_grad():
        other.head[-1].weight.neg_()
    found = compare_chain({"a": net, "b": other}, x, method="gradient")
    said = explain(other, x, method="gradient").target
    assert all(torch.equal(m.target, said) for m in found.maps.values())
    asked = compare_chain({"a": net, "b": other}, x, target="c", method="gradient")
    assert asked.maps["a"].names == ("c",) * 4


def test_each_reads_a_split_in_its_own_way() -> None:
    data = toy_data(12)
    large, small = build_model("small_cnn", data, size=24), build_model("small_cnn", data, size=18, seed=1)
    found = compare_chain({"large": large, "small": small}, data.test, method="gradient")
    assert found.maps["large"].map.shape[1:] == (24, 24) and found.maps["small"].map.shape[1:] == (18, 18)
    assert found.show()._repr_png_()[:4] == b"\x89PNG"


def test_what_cannot_be_compared_is_told() -> None:
    net, x = subject()
    with pytest.raises(AdaptkitError, match="two models or more"):
        compare_chain({"a": net}, x)
    other, _ = subject()
    other.classes = ("x", "y", "z")
    with pytest.raises(AdaptkitError, match="different classes"):
        compare_explanations(net, other, x)
    with pytest.raises(AdaptkitError, match="in pairs"):
        coarse_likeness(maps(0), maps(1, n=3))
