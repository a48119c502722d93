"Students: what they cost, counted and measured; branches that fold; layers cut from a teacher."

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

from adaptkit.core.registry import AdaptkitError
from adaptkit.distillation.costs import compare_students, latencies, median_of, megabytes, multiply_adds, threads
from adaptkit.heads.heads import Named, build_model, save_model
from adaptkit.models.backbones import lite0_classifier

FIVE = Named(tuple("abcde"))


# --- what a network costs --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "net, x",
    [
        (nn.Conv2d(6, 8, (3, 5), stride=2, padding=1, groups=2), torch.zeros(2, 6, 13, 9)),
        (nn.Conv1d(5, 7, 3, dilation=2), torch.zeros(3, 5, 17)),
        (nn.Linear(7, 5), torch.zeros(2, 11, 7)),
    ],
    ids=["conv2d", "conv1d", "linear"],
)
def test_multiply_adds_of_a_layer_are_those_of_torch(net, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    assert multiply_adds(net, x) * len(x) * 2 == counter.get_total_flops()


def test_multiply_adds_of_lite0_are_those_that_were_published():
    net = lite0_classifier(pretrained=False)
    counted = multiply_adds(net, torch.zeros(1, 3, 224, 224))
    assert counted == pytest.approx(0.407e9, rel=0.06)  # TensorFlow's table, which counts a little more
    assert sum(p.numel() for p in net.parameters()) == 4_652_008


@pytest.mark.parametrize("name", ["mobilenet_v2", "shufflenet_v2_x0_5"])
def test_multiply_adds_are_those_of_torchvision(name):
    published = models.get_model_weights(name).DEFAULT.meta["_ops"]
    counted = multiply_adds(models.get_model(name, weights=None), torch.zeros(1, 3, 224, 224)) / 1e9
    assert counted == pytest.approx(published, abs=0.001)


def test_counting_leaves_nothing_behind():
    model = build_model("small_cnn", FIVE, size=24)
    model.train()
    model.head.eval()
    with pytest.raises(RuntimeError):
        multiply_adds(model, torch.zeros(1, 4, 24, 24))
    assert model.training and not model.head.training
    assert not any(m._forward_hooks for m in model.modules())


def test_the_interval_of_a_median_is_that_of_order_statistics():
    found = median_of([float(i) for i in range(20, 0, -1)])  # Conover, table A3 for n = 20: ranks 6 and 15
    assert (found.median, found.low, found.high, found.n) == (10.5, 6.0, 15.0, 20)
    assert (median_of([3.0, 1, 2, 6, 5, 4]).low, median_of([3.0, 1, 2, 6, 5, 4]).high) == (1, 6)
    with pytest.raises(AdaptkitError, match="at least 6"):
        median_of([1.0] * 5)


def test_a_slower_network_is_measured_slower_and_threads_come_back():
    class Slow(nn.Module):
        def __init__(self, times):
            super().__init__()
            self.layer, self.times = nn.Linear(64, 64), times

        def example(self, n):
            return torch.rand(n, 64)

        def forward(self, x):
            for _ in range(self.times):
                x = self.layer(x)
            return x

    before = torch.get_num_threads()
    with threads(before + 1):
        found = latencies({"once": Slow(1), "often": Slow(300)}, rounds=9)
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    assert found["often"].low > found["once"].median and found["once"].n == 9


def test_megabytes_are_those_of_the_saved_file(tmp_path):
    model = build_model("small_cnn", FIVE, size=24)
    save_model(model, tmp_path)
    assert megabytes(model) == pytest.approx((tmp_path / "model.safetensors").stat().st_size / 1e6, rel=1e-3)


def test_students_side_by_side():
    mine = build_model("small_cnn", FIVE, size=20)
    choice = compare_students(["small_cnn", "bag_of_embeddings", mine], FIVE, size=32, rounds=6)
    assert [c.name for c in choice.costs] == ["small_cnn", "bag_of_embeddings", "small_cnn'"]
    assert [c.size for c in choice.costs] == [32, 32, 20]
    first, text, smaller = choice.costs
    assert first.parameters == smaller.parameters and first.multiply_adds > smaller.multiply_adds
    assert text.multiply_adds == 128 * 5  # a table of embeddings multiplies nothing
    assert list(choice.table()["parameters, times fewer"]) == pytest.approx(
        [text.parameters / first.parameters, 1, text.parameters / first.parameters], abs=0.06
    )
    assert choice.show()._repr_png_()[:4] == b"\x89PNG" and "<table" in choice._repr_html_()


def test_nothing_to_compare_and_unknown_names_are_refused():
    with pytest.raises(AdaptkitError, match="name at least one"):
        compare_students([], FIVE)
    with pytest.raises(AdaptkitError, match="Unknown backbone 'mobile_smal'"):
        compare_students(["mobile_smal"], FIVE)
    with pytest.raises(AdaptkitError, match="rounds=2"):
        compare_students(["small_cnn"], FIVE, size=24, rounds=2)
