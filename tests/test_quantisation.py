"""Eight bits: grids, graphs, ranges, repairs, files and the export, against independent implementations and against trouble that was planted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.quantization.calibrate import HistogramCollector
from onnxruntime.quantization.qdq_loss_debug import compute_signal_to_quantization_noice_ratio
from onnxruntime.quantization.quant_utils import compute_scale_zp
from torch import nn

from adaptkit.core.registry import AdaptkitError
from adaptkit.data.datasets import Samples
from adaptkit.data.texts import Texts, strings
from adaptkit.deployment.eight_bits import OnnxInt8
from adaptkit.deployment.equalise import bias_corrected, equalised, pairs_of, rescaled
from adaptkit.deployment.graphs import (
    Block,
    chain,
    flows,
    layers_of,
    open_session,
    parting,
    read_graph,
    run,
    tapped,
    unshared,
    weights_of,
    with_weights,
)
from adaptkit.deployment.grids import activation_grid, decibels, paired_product, weight_grid
from adaptkit.deployment.int8 import (
    NAIVE,
    Recipe,
    flowing,
    logits_of,
    mended,
    prepared,
    quantise,
    quantise_weights,
    write_int8,
)
from adaptkit.deployment.mixed import rounded_flows, sensitivity, sparing, with_flows, write_mixed
from adaptkit.deployment.ranges import CALIBRATIONS, Seen, check_calibration, entropy, observe, percentile
from adaptkit.deployment.sessions import EXPORTERS, check_exporter
from adaptkit.heads.heads import Named, build_model

RNG = np.random.default_rng(0)
STYLES = [(3, 12, 1, 1, 2, None), (12, 12, 3, 12, 1, 6.0), (12, 10, 1, 1, 1, None), (10, 10, 3, 10, 2, None), (10, 14, 1, 1, 1, None)]  # in, out, side, groups, stride, most


def some_block(inside: int, outside: int, side: int, groups: int, stride: int, most: float | None) -> Block:
    w = RNG.normal(0, (2 * groups / (inside * side**2)) ** 0.5, (outside, inside // groups, side, side))
    return Block(w.astype("f4"), RNG.normal(0, 0.2, outside).astype("f4"), stride, groups, most)


BLOCKS = [some_block(*s) for s in STYLES]
OPEN = [replace(b, most=None) for b in BLOCKS]
HEAD = (RNG.normal(0, 0.5, (5, 14)).astype("f4"), RNG.normal(0, 0.1, 5).astype("f4"))
BATCHES = [{"images": RNG.random((7, 3, 18, 14)).astype("f4")} for _ in range(3)]


def same(a: object, b: object, tolerance: float = 1e-4) -> bool:
    one, two = (np.concatenate([run(open_session(m), f)["logits"] for f in BATCHES]) for m in (a, b))
    return bool(abs(one - two).max() <= tolerance * abs(one).max())


def as_torch(blocks: list[Block], x: np.ndarray) -> np.ndarray:
    "The chain once more, by PyTorch."
    z = torch.from_numpy(x)
    for b in blocks:
        w, bias = torch.from_numpy(b.weight), torch.from_numpy(b.bias)
        z = nn.functional.conv2d(z, w, bias, b.stride, b.weight.shape[-1] // 2, groups=b.groups)
        z = z.clamp(0, b.most) if b.most else z.relu()
    return nn.functional.linear(z.mean((2, 3)), *map(torch.from_numpy, HEAD)).numpy()


# grids


@given(st.floats(-50, 50, width=32), st.floats(0, 80, width=32))
def test_an_uneven_grid_meets_zero_and_errs_by_half_a_step(low: float, width: float) -> None:
    grid = activation_grid(low, low + width)
    x = np.linspace(min(low, 0), max(low + width, 0), 97, dtype=np.float32)
    assert grid.rounded(np.zeros(1, np.float32))[0] == 0 and 0 <= grid.zero <= 255
    assert abs(grid.rounded(x) - x).max() <= 1.01 * float(grid.scale)  # the zero point, too, is rounded
    zero, scale = compute_scale_zp(np.float32(low), np.float32(low + width), np.uint8(0), np.uint8(255))
    assert np.isclose(scale, grid.scale, rtol=1e-5) or float(grid.scale) == 1
    assert abs(int(zero) - int(grid.zero)) <= 1 or float(grid.scale) == 1


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.filterwarnings("ignore")
def test_weights_are_rounded_as_pytorch_does(axis: int | None) -> None:
    w = (RNG.normal(size=(6, 5, 3, 2)) * np.geomspace(1e-3, 10, 6)[:, None, None, None]).astype("f4")
    grid, t = weight_grid(w, axis), torch.from_numpy(w)
    if axis is None:
        theirs = torch.quantize_per_tensor(t, float(grid.scale), 0, torch.qint8)
    else:
        theirs = torch.quantize_per_channel(t, torch.from_numpy(grid.scale), torch.zeros(w.shape[axis]), axis, torch.qint8)
    assert np.array_equal(grid.stored(w), theirs.int_repr().numpy()) and np.allclose(grid.rounded(w), theirs.dequantize().numpy())
    assert np.isclose(decibels(w, grid.rounded(w)), compute_signal_to_quantization_noice_ratio(w, grid.rounded(w)), atol=1e-3)


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(0, 2**31))
def test_pairs_are_cut_off_and_never_up_to_64(k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, w = rng.integers(0, 256, (4, k)), rng.integers(-127, 128, (k, 3))
    slow = np.zeros((4, 3), int)
    for i, j in np.ndindex(4, 3):
        for a in range(0, k, 2):
            slow[i, j] += min(max(int(x[i, a : a + 2] @ w[a : a + 2, j]), -(2**15)), 2**15 - 1)
    assert np.array_equal(paired_product(x, w), slow)
    small = np.clip(w, -64, 64)
    assert np.array_equal(paired_product(x, small), x @ small)
    assert paired_product(np.full((1, 2), 255), np.full((2, 1), 127))[0, 0] == 2**15 - 1


@pytest.mark.parametrize("wrong", [lambda: activation_grid(1, 0), lambda: activation_grid(0, np.inf), lambda: weight_grid(np.float32([1]), limit=128), lambda: weight_grid(np.float32([np.nan])), lambda: paired_product(np.ones((2, 3), int), np.ones((2, 2), int))])
def test_grids_refuse(wrong) -> None:
    with pytest.raises(AdaptkitError):
        wrong()


# graphs


@pytest.mark.parametrize("blocks", [BLOCKS, OPEN])
def test_a_chain_says_what_pytorch_says(blocks: list[Block]) -> None:
    x = BATCHES[0]["images"]
    assert np.allclose(run(open_session(chain(blocks, HEAD)), {"images": x})["logits"], as_torch(blocks, x), atol=1e-4)
    assert np.allclose(run(open_session(prepared(chain(blocks, HEAD))), {"images": x})["logits"], as_torch(blocks, x), atol=1e-4)


def test_layers_weights_and_taps(tmp_path: Path) -> None:
    model = chain(BLOCKS, HEAD)
    layers, held = layers_of(model), weights_of(model)
    assert [ly.groups for ly in layers[:-1]] == [b.groups for b in BLOCKS] and layers[-1].kind == "Gemm"
    before = model.SerializeToString()
    assert run(open_session(tapped(model, ["act1"])), BATCHES[0])["act1"].max() <= 6
    other = with_weights(model, {"head.bias": held["head.bias"] + 1})
    assert np.allclose(logits_of(other, BATCHES), logits_of(model, BATCHES) + 1, atol=1e-5) and model.SerializeToString() == before
    (tmp_path / "m.onnx").write_bytes(before)
    assert read_graph(tmp_path / "m.onnx") == model
    for wrong, told in ((lambda: tapped(model, ["x"]), "No node"), (lambda: with_weights(model, {"x": np.zeros(1)}), "no tensor"), (lambda: with_weights(model, {"head.bias": np.zeros(9)}), "shape"), (lambda: read_graph(tmp_path / "none"), "no .*none")):
        with pytest.raises(AdaptkitError, match=told):
            wrong()
    (tmp_path / "m.onnx").write_bytes(before[: len(before) // 2])
    with pytest.raises(AdaptkitError, match="damaged"):
        read_graph(tmp_path / "m.onnx")


def test_shared_weights_are_parted() -> None:
    block = some_block(12, 12, 1, 1, 1, None)
    model = prepared(chain([BLOCKS[0], block, block], (HEAD[0][:, :12].copy(), HEAD[1])))  # equal tensors are stored once
    names = [n for ly in layers_of(model) for n in (ly.weight, ly.bias)]
    assert len({*names}) == len(names) and unshared(model) == model


def test_parting_finds_where_it_begins() -> None:
    model = chain(OPEN, HEAD)
    held = weights_of(model)
    apart = parting(model, with_weights(model, {"conv2.weight": weight_grid(held["conv2.weight"], limit=1).rounded(held["conv2.weight"])}), inputs=BATCHES)
    assert apart["conv0"] == apart["conv1"] == float("inf") and apart["conv2"] < 20 and [*apart] == [ly.name for ly in layers_of(model)]


# ranges


def test_what_is_seen_is_what_flows() -> None:
    model = chain(BLOCKS, HEAD)
    seen = observe(model, ["images", "act1", "logits"], inputs=BATCHES)
    for name, s in seen.items():
        x = np.concatenate([f[name] for f in flows(model, [name], inputs=BATCHES)])
        rows = np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)
        assert (s.low, s.high) == (float(x.min()), float(x.max())) and np.allclose(s.means, rows.mean(1), atol=1e-5)
        assert np.allclose(s.reach, abs(rows).max(1)) and s.counts.sum() == x.size
    with pytest.raises(AdaptkitError, match="not finite"):
        observe(model, ["act1"], inputs=[{"images": np.full((1, 3, 8, 8), np.nan, "f4")}])


@pytest.mark.parametrize("x", [[1, np.nextafter(np.float32(1), np.float32(2))], [3e30, 3e30], [0, 1e-40]])
def test_values_that_are_nearly_the_same_are_counted(x: list[float]) -> None:
    seen = Seen.of(np.asarray(x, np.float32)[:, None])
    assert seen.counts.sum() == 2 and seen.counts[0] == (2 if seen.low == seen.high else 1)
    for rule in (CALIBRATIONS[name] for name in CALIBRATIONS):
        low, high = rule(seen)
        assert low <= high and np.isfinite([low, high]).all()


def test_rules_agree_with_an_independent_implementation() -> None:
    x = RNG.normal(0, 1, 80_000).astype("f4")
    x[:2] = 40, -40
    seen, found = Seen.of(x[:, None]), {}
    for method in ("percentile", "entropy"):
        theirs = HistogramCollector(method, method == "entropy", 2048, 255, 99.99, "same")
        theirs.collect({"x": [x]})
        found[method] = [float(v) for v in theirs.compute_collection_result()["x"][:2]]
    assert np.allclose(percentile(seen), found["percentile"], atol=3 * (seen.high - seen.low) / 2048)
    assert 0.5 < entropy(seen)[1] / found["entropy"][1] < 2 and entropy(seen)[1] < 0.5 * seen.high  # both leave the outliers out


@pytest.mark.parametrize("name", ["extremes", "percentile", "entropy", "least error"])
def test_each_rule_keeps_its_promises(name: str) -> None:
    check_calibration(CALIBRATIONS[name])


@pytest.mark.parametrize("rule", [lambda s: (s.high, s.low - 1), lambda s: (s.low, np.nan), lambda s: (s.low, 2 * abs(s.high) + 1)])
def test_the_contract_bites(rule) -> None:
    with pytest.raises(AdaptkitError, match="The rule"):
        check_calibration(rule)


# repairs


@pytest.mark.parametrize("seed", range(3))
def test_rescaling_says_the_same_and_equalising_undoes_it(seed: int) -> None:
    rng, model = np.random.default_rng(seed), chain(OPEN, HEAD)
    pairs = pairs_of(model)
    assert [p[0].name for p in pairs] == ["conv0", "conv1", "conv2", "conv3"]
    factors = {p[0].name: np.exp(rng.uniform(-3, 3, len(weights_of(model)[p[0].weight]))) for p in pairs}
    planted = rescaled(model, factors)
    seen = observe(planted, [n for p in pairs for n in (p[0].made, p[1].given)], inputs=BATCHES)
    for mended_one in (planted, equalised(planted), equalised(planted, seen)):
        assert same(model, mended_one, 1e-3)
    held = [weights_of(equalised(m)) for m in (model, planted)]
    for first, second, _ in pairs:  # whatever was planted, the same network comes back
        assert np.allclose(held[0][first.weight], held[1][first.weight], rtol=0.05, atol=1e-3 * abs(held[0][first.weight]).max()), second


def test_a_ceiling_is_kept() -> None:
    low = chain([replace(b, most=1.0) for b in BLOCKS], HEAD)
    seen = observe(low, [n for p in pairs_of(low) for n in (p[0].made, p[1].given)], inputs=BATCHES)
    assert any((s.reach >= 1).any() for s in seen.values()) and any((s.reach < 1).any() for s in seen.values())
    assert equalised(low) == low and equalised(low, seen) != low and same(low, equalised(low, seen), 1e-4)


def test_what_others_read_is_left_alone() -> None:
    model = chain(OPEN, HEAD)
    seen_outside = tapped(model, ["act1"])
    assert "conv1" not in [p[0].name for p in pairs_of(seen_outside)]
    for factors, told in (({"conv4": np.ones(14)}, "can't be rescaled"), ({"conv0": -np.ones(12)}, "above 0")):
        with pytest.raises(AdaptkitError, match=told):
            rescaled(model, factors)


@pytest.mark.parametrize("axis", [None, 0])
def test_corrected_biases_keep_the_means(axis: int | None) -> None:
    model, limit = chain([replace(OPEN[0], stride=1), *OPEN[1:]], HEAD), 3
    seen, held = observe(model, ["images", "act0", "act1", "act2", "act3"], inputs=BATCHES), weights_of(model)
    layer = layers_of(model)[0]  # no padding: the mean is exact
    small = {layer.weight: weight_grid(held[layer.weight], axis, limit=limit).rounded(held[layer.weight])}
    fixed = weights_of(bias_corrected(model, seen, axis=axis, limit=limit))
    means = [np.mean([f["conv0.out"].mean((0, 2, 3)) for f in flows(m, ["conv0.out"], inputs=BATCHES)], axis=0) for m in (model, with_weights(model, small), with_weights(model, {**small, layer.bias: fixed[layer.bias]}))]
    assert abs(means[1] - means[0]).max() > 1e-3 and np.allclose(means[2], means[0], atol=2e-4)
    assert not np.allclose(fixed["conv1.bias"], held["conv1.bias"]) and np.array_equal(fixed["head.bias"], held["head.bias"])
    assert weights_of(bias_corrected(model, seen, axis=axis, limit=limit, skip=frozenset({"conv1"})))["conv1.bias"] == pytest.approx(held["conv1.bias"])


# files


@pytest.mark.parametrize("recipe", [NAIVE, Recipe(), Recipe(limit=127, equalise="flow", correct=True, calibration="percentile")], ids=["usual", "ours", "all"])
def test_what_the_tool_writes_is_what_we_reckon(recipe: Recipe, tmp_path: Path) -> None:
    ready, seen = mended(prepared(chain(BLOCKS, HEAD)), recipe, inputs=BATCHES)
    file = write_int8(ready, seen, tmp_path / "m.onnx", recipe=recipe)
    held = weights_of(ready)
    rounded = [ly for ly in layers_of(ready) if ly.kind == "Conv" or recipe.last]
    small = {ly.weight: weight_grid(held[ly.weight], ly.axis if recipe.by_channel else None, limit=recipe.limit).rounded(held[ly.weight]) for ly in rounded}
    names = [t for t in rounded_flows(ready) if t != "features" or recipe.last]
    ours = logits_of(with_flows(with_weights(ready, small), {t: activation_grid(*CALIBRATIONS[recipe.calibration](seen[t])) for t in names}), BATCHES)
    theirs, truth = logits_of(file, BATCHES), logits_of(chain(BLOCKS, HEAD), BATCHES)
    assert decibels(ours, theirs) > 25 and decibels(truth, theirs) > 15
    stored = weights_of(read_graph(file))
    assert all(abs(stored[f"{ly.weight}_quantized"]).max() <= recipe.limit and stored[f"{ly.weight}_quantized"].dtype == np.int8 for ly in rounded)
    assert ("head.weight" in stored) != recipe.last and file.stat().st_size > 0


def test_spared_nodes_stay_and_failures_leave_nothing(tmp_path: Path) -> None:
    model = chain(BLOCKS, HEAD)
    stored = weights_of(read_graph(quantise(model, tmp_path / "a.onnx", inputs=BATCHES, recipe=Recipe(skip=("conv2",)))))
    assert stored["conv2.weight"].dtype == np.float32 and "conv1.weight_quantized" in stored
    for wrong in (lambda f: quantise(model, f, inputs=BATCHES, recipe=Recipe(skip=("conv9",))), lambda f: quantise(model, f, inputs=[]), lambda f: quantise(tmp_path / "none.onnx", f, inputs=BATCHES), lambda f: quantise_weights(model, f, limit=100)):
        with pytest.raises(AdaptkitError):
            wrong(tmp_path / "b.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]
    for wrong in ({"limit": 100}, {"calibration": "x"}, {"equalise": "yes"}):
        with pytest.raises(AdaptkitError, match="Unknown"):
            Recipe(**wrong)


# sparing


def test_the_trouble_is_found_and_spared(tmp_path: Path) -> None:
    blocks = [replace(b, stride=1) for b in OPEN]
    loud, deaf = blocks[2], blocks[3]
    big = np.r_[3000, np.ones(9)].astype("f4")
    blocks[2] = replace(loud, weight=loud.weight * big[:, None, None, None], bias=loud.bias * big)
    blocks[3] = replace(deaf, weight=deaf.weight / big[:, None, None, None])
    middle = logits_of(chain(blocks, HEAD), BATCHES).mean(0)
    recipe = Recipe(by_channel=False)
    ready, seen = mended(prepared(chain(blocks, (HEAD[0], HEAD[1] - middle))), recipe, inputs=BATCHES)
    labels = logits_of(ready, BATCHES).argmax(1)
    worst = [n for _, n in sensitivity(ready, seen, inputs=BATCHES, recipe=recipe).worst()]
    assert {"act2", "conv2", "conv3"} & {*worst[:3]}
    trials = write_mixed(ready, seen, tmp_path / "m.onnx", inputs=BATCHES, labels=labels, recipe=recipe, allowed=0.05)
    assert trials[0].spared == 0 and trials[-1].lost <= 0.05 < trials[0].lost
    assert trials[-1].lost == pytest.approx(1 - float((logits_of(tmp_path / "m.onnx", BATCHES).argmax(1) == labels).mean()))
    easy = write_mixed(ready, seen, tmp_path / "m.onnx", inputs=BATCHES, labels=labels, recipe=recipe, allowed=0.999)
    assert len(easy) == 1 and easy[0].skip == ()


def test_sparing_takes_makers_and_readers() -> None:
    model = prepared(chain(BLOCKS, HEAD))
    made = {n.name: n.op_type for n in model.graph.node}
    clip = next(n for n, kind in made.items() if kind == "Clip")
    assert sparing(model, []) == () and sparing(model, ["conv2"]) == ("conv2",)
    assert {*sparing(model, ["act1"])} == {"conv1", clip, "conv2"}
    assert {*rounded_flows(model)} < {*flowing(model)} and "conv1.out" not in rounded_flows(model)


# the export


def test_the_export_keeps_its_promises_for_images(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 255, (40, 20, 20, 3)).astype(np.uint8)
    model = build_model("mobile_tiny", Named(("a", "b", "c")), size=20, seed=1)
    with torch.no_grad():
        for name, value in model.named_buffers():
            value.add_(0.1 if "running" in name else 0)
    asked = model.eval()(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)
    samples = Samples(pixels, asked.argmax(1).numpy().astype(np.int64), [str(i) for i in range(40)])
    how = OnnxInt8(most=0.3, calibrate=16)
    assert check_exporter(how, model=model, samples=samples) < 0.5
    told = how.write(model, tmp_path / how.file, samples=samples)
    assert told["asked"] == 40 and told["calibrated"] == 16 and told["lost"] <= 0.3 and json.loads(json.dumps(told)) == json.loads(json.dumps(told))
    with pytest.raises(AdaptkitError, match="validation images"):
        how.write(model, tmp_path / "x.onnx")
    assert EXPORTERS["onnx-int8"] is OnnxInt8
    for wrong in ({"most": 1}, {"calibrate": 0}, {"ask": 0}):
        with pytest.raises(AdaptkitError):
            OnnxInt8(**wrong)


def test_the_export_keeps_its_promises_for_texts(tmp_path: Path) -> None:
    model = build_model("bag_of_embeddings", Named(("a", "b")), size=12, seed=1).eval()
    samples = Texts(strings([f"word{i} other{i % 3} thing" for i in range(20)]), np.arange(20) % 2)
    how = OnnxInt8(most=0.5)
    assert check_exporter(how, model=model, samples=samples) < 0.2
    EXPORTERS["onnx"]().write(model, tmp_path / "model.onnx")  # which the next ones find beside them
    told = how.write(model, tmp_path / how.file, samples=samples)
    assert how.write(model, tmp_path / "unseen.onnx")["asked"] == 0
    assert told["weights only"] and told["asked"] == 20
    assert (tmp_path / how.file).stat().st_size < 0.3 * (tmp_path / "model.onnx").stat().st_size
