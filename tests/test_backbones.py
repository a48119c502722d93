"""Backbones: the right weights, proven stages, pixel contract, folding, files and hubs."""

import pickle
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from adaptkit.core.registry import AdaptkitError
from adaptkit.models import backbones, sources
from adaptkit.models.backbones import BACKBONES, load_backbone, reference_name
from adaptkit.models.cutting import cut, guess_stages, pieces
from adaptkit.models.fusing import conv_bn_pairs, fused
from adaptkit.models.sources import adopt, read_weights, timm_net, torchvision_net
from adaptkit.models.stages import (
    Backbone,
    ImageBackbone,
    Staged,
    WeightSource,
    check_pixels,
    draw_stages,
    evaluating,
    pooled,
)

SOURCE = WeightSource("toy", origin="random initialisation", licence="none needed")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def lite0() -> Backbone:
    return load_backbone("efficientnet_lite0").eval()


def norms(module: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in module.modules())


# --- the weights are the right ones -------------------------------------------------------------------------


def test_logits_equal_the_reference_implementation():
    from efficientnet_lite_pytorch import EfficientNet

    path = backbones.lite0_weights()
    reference = EfficientNet.from_name("efficientnet-lite0")
    reference.load_state_dict(torch.load(path, weights_only=True))
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        ours, theirs = backbones.lite0_classifier()(x), reference.eval()(x)
    assert (ours - theirs).abs().max() <= 1e-4
    assert theirs.std() > 0.1


def test_features_and_old_classifier_give_the_logits_of_the_reference(lite0):
    from efficientnet_lite_pytorch import EfficientNet

    reference = EfficientNet.from_name("efficientnet-lite0")
    reference.load_state_dict(torch.load(backbones.lite0_weights(), weights_only=True))
    x = torch.rand(2, 3, 160, 192)
    with torch.no_grad():
        ours = reference._fc(lite0.features(x))
        theirs = reference.eval()((x - 127 / 255) / (128 / 255))
    assert (ours - theirs).abs().max() <= 1e-4


def test_a_photograph_gets_its_names():
    from matplotlib import cbook

    photo = (
        Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
        .convert("RGB")
        .resize((256, 300))
        .crop((16, 38, 240, 262))
    )
    x = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        top = backbones.lite0_classifier()((x - 127 / 255) / (128 / 255))[0].topk(3).indices.tolist()
    assert {400, 667, 652} == set(top)  # academic gown, mortarboard, military uniform


def test_names_are_a_bijection_that_agrees_with_the_order():
    in_file, in_timm = (
        read_weights(backbones.lite0_weights()),
        backbones.lite0_classifier(pretrained=False).state_dict(),
    )
    assert [reference_name(n) for n in in_timm] == list(in_file)


def test_another_file_in_the_package_is_refused(monkeypatch, tmp_path):
    (tmp_path / "w.pth").write_bytes(b"something else")
    fake = type(
        "F",
        (),
        {
            "EfficientnetLite0ModelFile": type(
                "M", (), {"get_model_file_path": staticmethod(lambda: tmp_path / "w.pth")}
            )
        },
    )
    monkeypatch.setattr(backbones, "require", lambda *a: fake)
    with pytest.raises(AdaptkitError, match="not the file we know"):
        load_backbone("efficientnet_lite0")


def test_source_record(lite0):
    assert lite0.source.licence == "Apache-2.0" and lite0.source.checksum.startswith("sha256:57934424")
    assert load_backbone("efficientnet_lite0", pretrained=False).source.origin == "random initialisation"


# --- pixels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "word"),
    [
        (torch.zeros(2, 3, 5, 4, dtype=torch.uint8), "divide by 255"),
        (torch.zeros(2, 3, 5, 4, dtype=torch.int64), "divide by 255"),
        (torch.full((2, 3, 5, 4), 1.01), "normalisation to the backbone"),
        (torch.full((2, 3, 5, 4), -0.01), "normalisation to the backbone"),
        (torch.full((2, 3, 5, 4), float("nan")), "finite"),
        (torch.full((2, 3, 5, 4), float("inf")), "finite"),
        (torch.zeros(2, 1, 5, 4), r"\[2, 1, 5, 4\]"),
        (torch.zeros(2, 5, 4, 3), "height, width"),
        (torch.zeros(3, 5, 4), "height, width"),
        (torch.zeros(0, 3, 5, 4), "at least one"),
    ],
)
def test_bad_pixels_get_a_sentence(x, word):
    with pytest.raises(AdaptkitError, match=word) as e:
        check_pixels(x)
    assert "\n" not in str(e.value)


def test_good_pixels_pass():
    x = torch.rand(2, 3, 5, 4)
    assert check_pixels(x) is x
    check_pixels(x.half())


def test_integers_never_reach_the_weights(lite0):
    with pytest.raises(AdaptkitError, match="divide by 255"):
        lite0(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))


def test_normalisation_happens_once_and_first(lite0):
    x = torch.rand(2, 3, 64, 48)
    with torch.no_grad():
        assert torch.allclose(lite0(x, stop=1), lite0.stages[0]((x - 127 / 255) / (128 / 255)), atol=1e-6)
    assert torch.equal(lite0(x, stop=0), x)
    assert {"mean", "std"} <= set(lite0.state_dict())


# --- stages -------------------------------------------------------------------------------------------------


def test_every_cut_gives_the_whole_bitwise(lite0):
    x, n = torch.rand(3, 3, 64, 96), len(lite0.stages)
    with torch.no_grad():
        whole, maps = lite0(x), lite0.maps(x)
        for k in range(n + 1):
            assert torch.equal(lite0(lite0(x, stop=k), start=k), whole)
    assert tuple(maps) == lite0.stage_names and torch.equal(maps["conv_head"], whole)
    assert torch.equal(lite0.features(x), whole.mean((2, 3))) and lite0.width == whole.shape[1] == 1280


@pytest.mark.parametrize("where", [{"start": -1}, {"start": 10}, {"start": 3, "stop": 2}, {"stop": 11}])
def test_stage_numbers_out_of_range(lite0, where):
    with pytest.raises(AdaptkitError, match="numbered from 0 to 9"):
        lite0(torch.rand(1, 3, 64, 64), **where)


def test_loading_leaves_batchnorm_untouched(lite0):
    assert (
        lite0.stages[0].bn1.num_batches_tracked == read_weights(backbones.lite0_weights())["_bn0.num_batches_tracked"]
    )


def test_evaluating_restores_modes_also_after_an_error():
    net = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3)).train()
    net[1].eval()
    with pytest.raises(RuntimeError), evaluating(net):
        assert not net.training and not torch.is_grad_enabled()
        raise RuntimeError
    assert net.training and net[0].training and not net[1].training


FAST = {
    "torchvision/resnet18": 5,
    "torchvision/mobilenet_v3_small": 13,
    "timm/resnet18": 5,
    "timm/vit_tiny_patch16_224": 1,
    "timm/convnext_atto": 5,
    "timm/mobilenetv3_small_100": 7,
    "densenet121": 8,
}
SLOW = {
    "vgg16": 5,
    "convnext_tiny": 8,
    "inception_v3": 16,
    "vit_b_16": 1,
    "swin_t": 8,
    "timm/swin_tiny_patch4_window7_224": 5,
    "googlenet": 12,
    "shufflenet_v2_x0_5": 5,
    "squeezenet1_1": 9,
    "regnet_y_400mf": 5,
    "maxvit_t": 5,
    "mnasnet0_5": 8,
    "timm/resnetv2_50": 5,
    "timm/nfnet_l0": 6,
    "timm/efficientnet_b0": 9,
    "timm/edgenext_xx_small": 5,
    "timm/fastvit_t8": 6,
}


def own_features(name: str, x: torch.Tensor, net: nn.Module) -> torch.Tensor:
    "What a network gives its classifier, pooled; found here in another way than the kit does."
    if hasattr(net, "forward_features"):
        out = net.forward_features(x)
        if out.ndim == 4 and out.shape[1] != net.num_features:
            out = out.permute(0, 3, 1, 2)
        return net.forward_head(out, pre_logits=True) if out.ndim == 3 else pooled(out)
    received = []
    last = [m for n, m in net.named_children() if n in ("fc", "classifier", "head", "heads")][-1]
    hook = last.register_forward_pre_hook(lambda m, args: received.append(args[0]))
    net(x)
    hook.remove()
    return received[0].flatten(1) if received[0].shape[-1] == 1 else pooled(received[0])


@pytest.mark.parametrize(
    ("name", "count"), [*FAST.items(), *(pytest.param(n, c, marks=pytest.mark.slow) for n, c in SLOW.items())]
)
def test_any_architecture_is_cut_and_folded_rightly(name, count, monkeypatch):
    kept: list[nn.Module] = []
    for which in ("timm_net", "torchvision_net"):
        build = getattr(sources, which)
        monkeypatch.setattr(
            backbones, which, lambda *a, build=build, **k: kept.append(build(*a, **k)[0]) or (kept[0], *REST)
        )
    size, norm = (299, [0.5] * 3) if name == "inception_v3" else (224, [0.4] * 3)
    size = 256 if any(n in name for n in ("edgenext", "fastvit")) else size
    REST = ({"mean": norm, "std": [0.25] * 3, "size": size}, SOURCE)
    backbone = load_backbone(name, pretrained=False).eval()
    x = torch.rand(2, 3, size, size)
    with torch.no_grad():
        features = backbone.features(x)
        assert len(backbone.stages) == count and bool(backbone.note) == (count == 1)
        if count > 1 and name != "vgg16":
            own = own_features(name, (x - norm[0]) / 0.25, kept[0])
            assert torch.allclose(features, own, rtol=1e-4, atol=1e-4 * own.abs().max().item())
        maps = backbone.maps(x)
        assert torch.equal(pooled(maps[backbone.stage_names[-1]]), features) and features.shape == (2, backbone.width)
        quick = fused(backbone, probe=x)
        assert (quick.features(x) - features).abs().max() <= 2e-3 * features.abs().max()
    if name in ("torchvision/resnet18", "timm/resnet18", "torchvision/mobilenet_v3_small"):
        assert norms(backbone) > 0 and norms(quick) == 0


class Detour(nn.Module):
    "Two blocks with a sum around the second: no chain."

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Sequential(nn.Conv2d(c, 6, 3, padding=1), nn.BatchNorm2d(6)) for c in (3, 6))
        self.fc = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self.a(x)
        return self.fc((self.b(low) + low).mean((2, 3)))


class Again(Detour):
    "Runs its second block twice."

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.b(self.b(self.a(x))).mean((2, 3)))


@pytest.mark.parametrize("net", [Detour(), Again()])
def test_a_wrong_guess_falls_back_to_one_stage_and_says_so(net):
    stages, note = cut(net.eval(), size=24)
    assert list(stages) == ["all"] and "could not be cut" in note
    backbone = ImageBackbone(stages, name="x", size=24, source=SOURCE, note=note)
    assert backbone(torch.rand(2, 3, 24, 24)).shape == (2, 6) and backbone.width == 6


def test_cutting_leaves_no_hooks_and_no_modes_changed():
    net = Detour().train()
    cut(net, size=24)
    assert all(m.training for m in net.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())


def test_a_stage_without_parameters_joins_its_neighbour():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), Detour().a[0:0], nn.Conv2d(4, 5, 3), nn.MaxPool2d(2))
    stages = guess_stages(pieces(net))
    assert all(any(True for _ in s.parameters()) for s in stages.values())
    assert sum(len(s) for s in stages.values()) == 5


# --- folding ------------------------------------------------------------------------------------------------


def test_fused_equals_and_leaves_the_original_alone(lite0):
    before = {k: v.clone() for k, v in lite0.state_dict().items()}
    quick = fused(lite0)
    x = torch.rand(3, 3, 64, 96)
    with torch.no_grad():
        for k in (3, 9):
            assert torch.allclose(quick(x, stop=k), lite0(x, stop=k), atol=1e-4, rtol=1e-4)
    assert norms(quick) == 0 and norms(lite0) == 49
    assert all(torch.equal(v, before[k]) for k, v in lite0.state_dict().items())
    assert not any(p.requires_grad for p in quick.parameters()) and not quick.training
    assert not any(m._forward_hooks for m in [*lite0.modules(), *quick.modules()])


class Shared(nn.Module):
    "The convolution has a second reader."

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
        nn.init.uniform_(self.bn.running_mean, 1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.bn(y) + y


class Centred(nn.Conv2d):
    "A convolution that changes its weights whenever it runs."

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, w / w.std((1, 2, 3), keepdim=True), self.bias)


def centred() -> nn.Module:
    net = nn.Sequential(Centred(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 6, 3), nn.BatchNorm2d(6))
    nn.init.uniform_(net[1].running_var, 4, 9)
    return net


@pytest.mark.parametrize(("net", "left"), [(Shared(), 1), (centred(), 1)])
def test_folding_is_undone_where_it_would_be_wrong(net, left):
    x = torch.rand(2, 3, 12, 10)
    quick = fused(net.train(), probe=x)
    assert norms(quick) == left
    with evaluating(net):
        assert torch.allclose(quick(x), net(x), atol=1e-5)
    assert net.training


def test_definition_order_does_not_fool_the_pairs():
    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn2, self.conv2, self.bn1 = (
                nn.Conv2d(3, 4, 1),
                nn.BatchNorm2d(4),
                nn.Conv2d(4, 4, 1),
                nn.BatchNorm2d(4),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn2(self.conv2(self.bn1(self.conv1(x))))

    assert conv_bn_pairs(Swapped().eval(), torch.rand(2, 3, 5, 4)) == [("conv1", "bn1"), ("conv2", "bn2")]


def test_a_module_without_size_needs_a_probe():
    with pytest.raises(AdaptkitError, match="probe"):
        fused(nn.Conv2d(3, 4, 3))


# --- files and hubs -----------------------------------------------------------------------------------------


def test_a_pickle_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    for name in ("evil.pth", "evil.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps({"fc.weight": Evil()}, protocol=2))
        with pytest.raises(AdaptkitError, match="nothing in it was run"):
            load_backbone("resnet18", weights=tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_local_file_is_enough(tmp_path, ending, library):
    build = timm_net if library == "timm" else torchvision_net
    donor = build("resnet18", pretrained=False, weights=None, **({"size": None} if library == "timm" else {}))[0]
    donor.fc = nn.Linear(512, 7)  # somebody else's classes: dropped anyway
    path = tmp_path / f"w.{ending}"
    state = {k: v for k, v in donor.state_dict().items() if "num_batches" not in k}
    save_file(state, path) if ending == "safetensors" else torch.save({"state_dict": state}, path)
    backbone = load_backbone(f"{library}/resnet18", weights=path)
    assert torch.equal(backbone.stages[4].layer4[1].conv2.weight, donor.layer4[1].conv2.weight)
    assert backbone.source.origin == path.name and len(backbone.source.checksum) == 71


def test_own_file_for_lite0_in_either_language(tmp_path):
    net = backbones.lite0_classifier(pretrained=False)
    for name in (lambda n: n, reference_name):
        save_file({name(k): v for k, v in net.state_dict().items()}, tmp_path / "w.safetensors")
        backbone = load_backbone("efficientnet_lite0", weights=tmp_path / "w.safetensors")
        assert torch.equal(backbone.stages[0].conv_stem.weight, net.conv_stem.weight)


def test_a_file_of_another_network_is_refused(tmp_path):
    from torchvision import models

    save_file(models.resnet18().state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(AdaptkitError, match="not a file for this network.*missing or of another shape"):
        load_backbone("torchvision/mobilenet_v3_small", weights=tmp_path / "w.safetensors")
    with pytest.raises(AdaptkitError, match="no weights file"):
        load_backbone("torchvision/resnet18", weights=tmp_path / "absent.pth")
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(AdaptkitError, match="not a file for this network"):
        adopt(models.resnet18(), read_weights(tmp_path / "w.safetensors"), path="w")


def test_old_densenet_names_are_understood():
    from torchvision import models

    net, other = models.densenet121(), models.densenet121()
    old = {
        k.replace("norm1", "norm.1").replace("conv2", "conv.2") if "denselayer" in k else k: v
        for k, v in net.state_dict().items()
    }
    adopt(other, old, path="old")
    assert torch.equal(
        other.features.denseblock1.denselayer2.conv2.weight, net.features.denseblock1.denselayer2.conv2.weight
    )


@pytest.mark.parametrize("name", ["timm/resnet18", "torchvision/resnet18", "resnet18"])
def test_no_network_is_one_sentence(name, monkeypatch, tmp_path):
    def nobody(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", nobody)
    monkeypatch.setattr("torch.hub.urlopen", nobody)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(AdaptkitError, match=r"weights='a/local/file.safetensors', or pretrained=False") as e:
        load_backbone(name)
    assert "\n" not in str(e.value) and "Name or service not known" in str(e.value)
    assert not list(tmp_path.rglob("*.pth"))


def test_timm_reads_the_cache_of_the_hub_without_a_network(monkeypatch, tmp_path):
    import timm

    donor = timm.create_model("resnet18")
    save_file(donor.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: str(tmp_path / "model.safetensors"))
    monkeypatch.setattr(sources, "reach", lambda url: pytest.fail("asked the network"))
    backbone = load_backbone("timm/resnet18")
    assert torch.equal(backbone.stages[0].conv1.weight, donor.conv1.weight) and backbone.source.licence == "apache-2.0"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet81", "'resnet18'"),
        ("efficientnet_lite", "'efficientnet_lite0'"),
        ("timm/convnext_ato", "'timm/convnext_atto'"),
        ("smal_cnn", "'small_cnn'"),
    ],
)
def test_unknown_names_get_the_nearest(name, hint):
    with pytest.raises(AdaptkitError, match=f"Did you mean {hint}") as e:
        load_backbone(name)
    assert len(str(e.value)) < 300  # every backbone of the registry is named


def test_bad_sizes():
    for size in (0, -3):
        with pytest.raises(AdaptkitError, match="number of pixels"):
            load_backbone("small_cnn", size=size)
    with pytest.raises(AdaptkitError, match="at least 18"):
        load_backbone("small_cnn", size=12)
    with pytest.raises(AdaptkitError, match="does not run on images of 30 pixels"):
        load_backbone("torchvision/inception_v3", pretrained=False, size=30)


def test_registry_is_open():
    def mine(*, pretrained=True, weights=None, size=None):
        return ImageBackbone({"one": nn.Conv2d(3, 5, 3)}, name="mine", size=size or 16, source=SOURCE)

    try:
        BACKBONES.register("mine")(mine)
        assert load_backbone("mine", size=20).shapes == {"one": (5, 18, 18)}
    finally:
        BACKBONES.items.pop("mine")


def test_picture_and_repr(lite0):
    assert len(draw_stages(lite0).axes) == 2
    assert repr(lite0) == "Backbone(efficientnet_lite0: 9 stages, 3.4 M parameters, 224 px -> 1280)"
    assert isinstance(lite0, Staged)


def test_nothing_heavy_at_import():
    import subprocess
    import sys

    code = "import sys, torch; import adaptkit.heads.heads; print([m for m in ('timm', 'torchvision', 'matplotlib.pyplot', 'pandas', 'sklearn') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
