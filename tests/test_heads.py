"""Heads and models: shapes, seeds, staged = whole, and files that come back or not at all."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from adaptkit.core.registry import AdaptkitError
from adaptkit.heads.heads import HEADS, Model, Named, build_model, count, load_model, rebuild, save_model
from adaptkit.models.backbones import load_backbone
from adaptkit.models.fusing import fused
from adaptkit.models.stages import ImageBackbone, WeightSource

DATA = Named(("a", "b", "c"))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def small(**options) -> Model:
    return build_model("small_cnn", DATA, **options).eval()


@pytest.mark.parametrize("name", ["linear", "mlp", "conv", "cosine", "dense"])
def test_every_head_maps_maps_to_logits_and_learns(name):
    options = {"cells": 5 * 7} if name == "dense" else {}
    head = HEADS[name](11, 3, **options)
    out = head(torch.rand(2, 11, 5, 7))
    assert out.shape == (2, 3)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["linear", "mlp", "cosine"])
def test_pooling_heads_take_features_too(name):
    head, x = HEADS[name](11, 3).eval(), torch.rand(2, 11, 5, 7)
    assert torch.allclose(head(x), head(x.mean((2, 3))), atol=1e-6)


def test_conv_head_without_positions_says_so():
    with pytest.raises(AdaptkitError, match="needs a map"):
        HEADS["conv"](11, 3)(torch.rand(2, 11))


def test_linear_head_is_the_mean_of_itself_at_every_position():
    head, x = HEADS["linear"](11, 3).eval(), torch.rand(2, 11, 5, 7)
    everywhere = torch.einsum("bchw,kc->bkhw", x, head[2].weight).mean((2, 3)) + head[2].bias
    assert torch.allclose(head(x), everywhere, atol=1e-6)


def test_cosine_ignores_length_and_stays_in_its_scale():
    head, x = HEADS["cosine"](11, 3, scale=4.0), torch.randn(2, 11)
    assert torch.allclose(head(x), head(9 * x), atol=1e-5) and head(x).abs().max() <= 4.0 + 1e-5


@pytest.mark.parametrize("head", ["linear", "mlp", "conv", "cosine", "dense"])
def test_staged_is_whole_for_every_start(head):
    model, x = small(head=head), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        whole = model(x)
        for k in range(model.n_stages + 1):
            assert torch.equal(model(model.backbone(x, stop=k), start=k), whole)
    with pytest.raises(AdaptkitError):
        model(x, start=model.n_stages + 1)


def test_staged_is_whole_on_the_pretrained_network():
    model, x = build_model("efficientnet_lite0", DATA).eval(), torch.rand(2, 3, 96, 64)
    with torch.no_grad():
        whole, quick = model(x), fused(model)
        assert torch.allclose(quick(x), whole, atol=1e-5)
        for k in range(model.n_stages + 1):
            assert torch.equal(model(model.backbone(x, stop=k), start=k), whole)
            assert torch.allclose(quick(model.backbone(x, stop=k), start=k), whole, atol=1e-5)
    assert isinstance(quick, Model) and quick.classes == model.classes


def test_the_small_cnn_is_the_network_of_the_tutorials():
    reference = nn.Sequential(
        *(
            nn.Conv2d(3, 32, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3),
            nn.ReLU(),
        ),
        *(nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    model = build_model("small_cnn", Named(tuple("0123456789")), head="dense")
    assert count(model) == (122_570, 122_570)
    reference.load_state_dict(
        dict(
            zip(
                reference.state_dict(),
                [v for k, v in model.state_dict().items() if k not in ("backbone.mean", "backbone.std")],
                strict=True,
            )
        )
    )
    x = torch.rand(2, 3, 32, 32)
    assert torch.allclose(model(x), reference(x), atol=1e-6)


@pytest.mark.parametrize("size", [18, 28, 64, 101])
def test_the_small_cnn_at_any_declared_size(size):
    model = small(head="dense", size=size)
    assert model(torch.rand(2, 3, size, size)).shape == (2, 3) and model.size == size


def test_a_seed_makes_the_model_and_disturbs_nobody():
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    one = small(seed=3)
    assert torch.equal(torch.rand(4), expected)
    two, other = small(seed=3), small(seed=4)
    same = [torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True)]
    assert all(same) and not torch.equal(one.head[2].weight, other.head[2].weight)


def test_the_head_starts_alike_from_name_and_object():
    one, two = small(seed=1), build_model(load_backbone("small_cnn"), DATA, seed=1)
    assert torch.equal(one.head[2].weight, two.head[2].weight)


def test_bad_arguments_get_sentences():
    with pytest.raises(AdaptkitError, match="Did you mean 'linear'"):
        small(head="liner")
    with pytest.raises(AdaptkitError, match="Did you mean 'hidden'"):
        small(head="mlp", hiden=3)
    with pytest.raises(AdaptkitError, match="at least two classes"):
        build_model("small_cnn", Named(("only",)))
    with pytest.raises(AdaptkitError, match="Did you mean 'small_cnn'"):
        build_model("smal_cnn", DATA)


def test_describe_counts_everything_once():
    model = small(head="mlp")
    for p in model.backbone.stages[0].parameters():
        p.requires_grad_(False)
    table = model.describe()
    assert list(table.index) == ["conv1", "conv2", "conv3", "head", "total"]
    assert table.parameters[:-1].sum() == table.parameters["total"] == sum(p.numel() for p in model.parameters())
    assert table.trainable["conv1"] == 0 and table.output["conv3"] == "64 x 4 x 4"


@pytest.mark.parametrize("head", ["linear", "mlp", "conv", "cosine", "dense"])
def test_save_and_load_is_bitwise(tmp_path, head):
    model, x = small(head=head, size=40), torch.rand(2, 3, 40, 40)
    model.train()(x)  # move BatchNorm statistics where there are some
    model.eval().preprocess["fit"] = "pad"
    assert save_model(model, tmp_path / "m") == tmp_path / "m"
    back = load_model(tmp_path / "m")
    assert torch.equal(back(x), model(x)) and not back.training
    assert (back.classes, back.config, back.preprocess, back.size) == (
        model.classes,
        model.config,
        model.preprocess,
        40,
    )
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["model.json", "model.safetensors"]


def test_save_and_load_a_pretrained_model_with_its_licence(tmp_path):
    model, x = build_model("efficientnet_lite0", DATA).eval(), torch.rand(2, 3, 64, 96)
    back = load_model(save_model(model, tmp_path))
    assert torch.equal(back(x), model(x)) and back.backbone.source == model.backbone.source


def test_channels_last_models_can_be_saved(tmp_path):
    model, x = small().to(memory_format=torch.channels_last), torch.rand(2, 3, 32, 32)
    assert torch.allclose(load_model(save_model(model, tmp_path))(x), model(x), atol=1e-6)


def test_rebuild_from_json():
    model = small(head="dense")
    again = rebuild(json.loads(json.dumps(model.config)))
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert again.config == model.config


def test_rebuilding_and_loading_download_nothing(tmp_path, monkeypatch):
    model = build_model("torchvision/mobilenet_v3_small", DATA, pretrained=False).eval()
    save_model(model, tmp_path)
    monkeypatch.setattr("adaptkit.models.sources.reach", lambda url: pytest.fail("asked the network"))
    monkeypatch.setattr("torch.hub.urlopen", lambda *a, **k: pytest.fail("asked the network"))
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(load_model(tmp_path)(x), model(x))


def edit(folder, **changes):
    record = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**record, **changes}))
    return record


def test_tampering_is_found_out(tmp_path):
    from adaptkit.models.sources import sha256

    save_model(small(), tmp_path)
    record = edit(tmp_path, version=7)
    with pytest.raises(AdaptkitError, match="format version 7"):
        load_model(tmp_path)
    edit(tmp_path, version=1, config={**record["config"], "classes": ["a", "b"]})
    with pytest.raises(AdaptkitError, match=r"head.2.bias should be \(2,\), found \(3,\)"):
        load_model(tmp_path)
    for config in (
        {},
        {"backbone": "small_cnn"},
        None,
        [],
        {**record["config"], "size": "big"},
        {**record["config"], "options": {"hidden": 2}},
    ):
        edit(tmp_path, config=config)
        with pytest.raises(AdaptkitError):
            load_model(tmp_path)
    edit(tmp_path, config=record["config"], source={"nonsense": 1})
    with pytest.raises(AdaptkitError, match="incomplete or damaged"):
        load_model(tmp_path)
    edit(tmp_path, source=record["source"])
    assert load_model(tmp_path).classes == DATA.classes
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "head.2.bias": torch.zeros(5)}, file)
    with pytest.raises(AdaptkitError, match="other checksum"):
        load_model(tmp_path)
    edit(tmp_path, weights=sha256(file))
    with pytest.raises(AdaptkitError, match=r"found \(5,\)"):
        load_model(tmp_path)
    file.unlink()
    with pytest.raises(AdaptkitError, match="There is no"):
        load_model(tmp_path)
    with pytest.raises(AdaptkitError, match="Cannot read"):
        load_model(tmp_path / "nowhere")


def test_an_interrupted_save_keeps_the_old_model(tmp_path, monkeypatch):
    model, x = small(seed=1), torch.rand(2, 3, 32, 32)
    save_model(model, tmp_path)

    def dying(tensors, path, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", dying)
    with pytest.raises(AdaptkitError, match="No space left"):
        save_model(small(seed=2), tmp_path)
    assert torch.equal(load_model(tmp_path)(x), model(x))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_model_made_by_hand_cannot_be_saved(tmp_path):
    backbone = ImageBackbone({"one": nn.Conv2d(3, 5, 3)}, name="x", size=16, source=WeightSource("x", origin="", licence=""))
    model = Model(backbone, nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), classes=DATA.classes)
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 3)
    with pytest.raises(AdaptkitError, match="made by build_model"):
        save_model(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_cosine_with_small_scale_has_a_floor():
    head = HEADS["cosine"](4, 2, scale=1.0)
    with torch.no_grad():
        head[1].weight.copy_(torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]]))
    loss = nn.functional.cross_entropy(head(torch.tensor([[3.0, 0, 0, 0]])), torch.tensor([0]))
    assert math.isclose(loss.item(), math.log(1 + math.exp(-2)), rel_tol=1e-5)
