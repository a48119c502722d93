"Students: what they cost, counted and measured; branches that fold; layers cut from a teacher."

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

from adaptkit.core.registry import AdaptkitError
from adaptkit.distillation.costs import compare_students, latencies, median_of, megabytes, multiply_adds, threads
from adaptkit.distillation.cutting import cut_layers
from adaptkit.distillation.students import Branches, Sparse
from adaptkit.heads.heads import Named, build_model, load_model, save_model
from adaptkit.models.backbones import folded, fused, lite0_classifier, load_backbone
from adaptkit.models.reading import over_tokens
from adaptkit.testing import check_backbone

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


# --- branches that fold ----------------------------------------------------------------------------


def lived(module, seed=0):
    "Norms as a training leaves them."
    torch.manual_seed(seed)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean, -0.5, 0.5), nn.init.uniform_(m.running_var, 0.2, 3)
            nn.init.uniform_(m.weight, -1, 2), nn.init.uniform_(m.bias, -0.5, 0.5)
    return module.eval()


LAYERS = {
    "dense": Branches(6, 6),
    "two groups": Branches(6, 6, groups=2),
    "depthwise": Branches(6, 6, groups=6),
    "pointwise with identity": Branches(6, 6, kernel=1),
    "other channels": Branches(6, 10, kernel=5),
    "stride": Branches(6, 6, stride=2, groups=6),
}


@pytest.mark.parametrize("name", list(LAYERS))
def test_branches_fold_exactly(name):
    layer, x = lived(LAYERS[name]), torch.randn(3, 6, 11, 8)
    one = layer.folded()
    assert [type(m) for m in one] == [nn.Conv2d, nn.ReLU]
    with torch.no_grad():
        torch.testing.assert_close(one(x), layer(x), rtol=1e-5, atol=1e-5)
        assert float(layer(x).max()) > 0.1


def test_the_folded_kernel_is_the_formula_of_the_paper():
    "RepVGG, equation 3, in numpy, on a dense layer of two channels."
    layer = lived(Branches(2, 2))
    total, shift = np.zeros((2, 2, 3, 3)), np.zeros(2)
    for branch in layer.branches:
        norm = branch if isinstance(branch, nn.BatchNorm2d) else branch[1]
        gamma, beta, mean, var = (t.detach().double().numpy() for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
        kernel = np.zeros((2, 2, 3, 3))
        if norm is branch:
            kernel[[0, 1], [0, 1], 1, 1] = 1
        elif branch[0].kernel_size == (1, 1):
            kernel[:, :, 1, 1] = branch[0].weight.detach().numpy()[:, :, 0, 0]
        else:
            kernel = branch[0].weight.detach().double().numpy()
        scale = gamma / np.sqrt(var + norm.eps)
        total, shift = total + kernel * scale[:, None, None, None], shift + beta - mean * scale
    one = layer.folded()[0]
    assert np.allclose(one.weight.detach(), total, atol=1e-6) and np.allclose(one.bias.detach(), shift, atol=1e-6)


@pytest.mark.parametrize("name", ["mobile_tiny", "mobile_small", "mobile_medium"])
def test_the_family_keeps_the_contract_before_and_after_folding(name):
    backbone = lived(load_backbone(name, size=40))
    assert backbone.name == name and backbone.source.origin == "random initialisation"
    check_backbone(backbone)
    single, x = folded(backbone), backbone.example(2)
    check_backbone(single)
    assert backbone.recipe == {} and single.recipe == {"folded": True}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in single.modules())
    assert sum(isinstance(m, nn.Conv2d) for m in single.modules()) == 17  # stem, eight blocks of two
    with torch.no_grad():
        gap = (single(x) - backbone(x)).abs().max() / backbone(x).abs().max()
        assert float(gap) < 1e-5
        assert float((fused(backbone)(x) - single(x)).abs().max() / backbone(x).abs().max()) < 1e-5


def test_all_branches_learn_and_the_first_step_already_falls():
    model = build_model("mobile_tiny", FIVE, size=20, seed=1).train()
    x, y = torch.rand(8, 3, 20, 20), torch.arange(8) % 5
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.1), []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_folded_student_is_saved_and_loaded(tmp_path):
    model = build_model("mobile_tiny", FIVE, size=20, seed=1)
    lived(model)
    save_model(folded(model), tmp_path)
    back, x = load_model(tmp_path), model.example(3)
    assert json.loads((tmp_path / "model.json").read_text())["config"]["recipe"] == {"folded": True}
    with torch.no_grad():
        torch.testing.assert_close(back(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "arguments, words", [({"weights": "x.safetensors"}, "leave `weights` out"), ({"size": 16}, "at least 17")]
)
def test_what_the_family_cannot_do_is_said(arguments, words):
    with pytest.raises(AdaptkitError, match=words):
        load_backbone("mobile_small", **arguments)
    with pytest.raises(AdaptkitError, match="no middle"):
        Branches(3, 4, kernel=2)


# --- layers cut from a teacher ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader():
    "A teacher that reads."
    return build_model("minilm", FIVE, size=16, seed=3).eval()


def test_the_first_layers_of_a_reader_answer_as_its_own_hidden_states(reader):
    student, x = cut_layers(reader, 2).eval(), reader.example(3)
    with torch.no_grad():
        below = over_tokens(reader.backbone(x, stop=3))
        torch.testing.assert_close(student.backbone(x), below, rtol=0, atol=1e-6)
        torch.testing.assert_close(student(x), reader.head(below), rtol=0, atol=1e-5)
    check_backbone(student.backbone)
    assert student.backbone.recipe["encoder"]["num_hidden_layers"] == 2 and "layer1, layer2" in student.backbone.note


def test_any_layers_of_a_reader_are_copied_and_the_teacher_is_left(reader):
    before = {k: v.clone() for k, v in reader.state_dict().items()}
    student = cut_layers(reader, ["layer2", "layer5"])
    for mine, theirs in ((1, 2), (2, 5)):
        own, old = (m.backbone.stages[i].state_dict() for m, i in ((student, mine), (reader, theirs)))
        assert own.keys() == old.keys() and all(torch.equal(own[k], old[k]) for k in own)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1)
    assert all(torch.equal(v, before[k]) for k, v in reader.state_dict().items())


@pytest.mark.parametrize("keep", [1, 4, ["conv_stem", "blocks.0"]], ids=str)
def test_stages_of_a_network_that_sees(keep, tmp_path):
    teacher = build_model(load_backbone("efficientnet_lite0", pretrained=False, size=40), FIVE, seed=0).eval()
    student, x = cut_layers(teacher, keep).eval(), teacher.example(2)
    n = keep if isinstance(keep, int) else len(keep)
    with torch.no_grad():
        assert torch.equal(student.backbone(x), teacher.backbone(x, stop=n))
    save_model(student, tmp_path)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(x), student(x))


def test_a_head_with_cells_is_made_anew_for_the_larger_map():
    teacher = build_model("small_cnn", FIVE, head="dense", size=32)
    student = cut_layers(teacher, 2)
    assert student(teacher.example(2)).shape == (2, 5)
    assert student.config["options"]["cells"] > teacher.config["options"]["cells"]


def test_a_saved_reader_keeps_its_two_layers(reader, tmp_path):
    student, x = cut_layers(reader, 2).eval(), reader.example(2)
    save_model(student, tmp_path)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(x), student(x))


@pytest.mark.parametrize(
    "keep, words",
    [
        (0, "give 1 to 6"),
        (7, "give 1 to 6"),
        ([], "Unknown stage"),
        (["layer7"], "Did you mean 'layer6'"),
        (["embeddings"], "at least one layer"),
    ],
)
def test_layers_that_are_not_there(reader, keep, words):
    with pytest.raises(AdaptkitError, match=words):
        cut_layers(reader, keep)


def test_what_cannot_be_cut_is_said():
    with pytest.raises(AdaptkitError, match="does not run with conv2 alone"):
        cut_layers(build_model("small_cnn", FIVE, size=32), ["conv2"])
    with pytest.raises(AdaptkitError, match="no transformer in layers"):
        cut_layers(build_model("character_cnn", FIVE), 1)


def test_a_damaged_recipe_is_an_error(tmp_path):
    save_model(cut_layers(build_model("small_cnn", FIVE, size=32), 2), tmp_path)
    record = json.loads((tmp_path / "model.json").read_text())
    for recipe in (["stages"], {"stages": ["nonsense"]}, {"stages": 5}):
        record["config"]["recipe"] = recipe
        (tmp_path / "model.json").write_text(json.dumps(record))
        with pytest.raises(AdaptkitError):
            load_model(tmp_path)


# --- a crash of PyTorch 2.15 -----------------------------------------------------------------------

LEARN = """
import torch
from adaptkit.heads.heads import Named, build_model
net = build_model("mobile_tiny", Named(("a", "b")), size=64, seed=0).train().to(memory_format=torch.channels_last)
for _ in range(4):
    x = torch.rand(8, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    torch.nn.functional.cross_entropy(net(x), torch.tensor([0, 1] * 4)).backward()
"""


def test_a_student_learns_with_channels_side_by_side():
    done = subprocess.run([sys.executable, "-c", LEARN], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("groups", [1, 4])
def test_pixels_that_are_apart_are_the_same_convolution(groups):
    torch.manual_seed(0)
    ours, x = Sparse(4, 8, 1, 2, 0, groups=groups), torch.rand(3, 4, 9, 7, requires_grad=True)
    theirs = nn.Conv2d(4, 8, 1, 2, 0, groups=groups)
    theirs.load_state_dict(ours.state_dict())
    assert ours(x).shape == (3, 8, 5, 4)
    for mine, other in zip(torch.autograd.grad(ours(x).square().sum(), [x, ours.weight]), torch.autograd.grad(theirs(x).square().sum(), [x, theirs.weight]), strict=True):
        assert (mine - other).abs().max() <= 1e-5 * other.abs().max()
