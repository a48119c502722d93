"A model leaves the notebook: folders that are refused when altered, exports that say the same, cards without invented numbers."

from __future__ import annotations

import copy
import json
import pickle
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from adaptkit.core.registry import AdaptkitError
from adaptkit.data.datasets import Samples, make_batch
from adaptkit.data.sources import load_data
from adaptkit.data.texts import Texts, strings
from adaptkit.deployment.card import card, licence_id, plain, yaml_lines
from adaptkit.deployment.certificate import certify, far_witnesses, folder_steps, forms_in, witness
from adaptkit.deployment.export import export
from adaptkit.deployment.exporters import HALF, Onnx, OnnxHalf, Torch, archive_trouble, with_half_weights
from adaptkit.deployment.folder import changing, open_folder
from adaptkit.deployment.sealed import MANIFEST, building, is_pickle, seal_of
from adaptkit.deployment.sessions import EXPORTERS, feeds, misfit, moved, takes_of
from adaptkit.heads.heads import Named, build_model
from adaptkit.models.sources import sha256
from adaptkit.models.stages import evaluating, pooled
from adaptkit.testing import check_exporter, toy_data
from adaptkit.training.finetune import FineTune
from adaptkit.training.loop import fit
from adaptkit.training.plan import Plan

@pytest.fixture(scope="module")
def data():
    return toy_data(24)


@pytest.fixture(scope="module")
def model(data):
    return moved(build_model("mobile_tiny", data, size=18, seed=3)).eval()


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    return export(model, ["onnx", "onnx-half", "torch"], out=tmp_path_factory.mktemp("made") / "model")


@pytest.fixture
def folder(exported, tmp_path: Path) -> Path:
    shutil.copytree(exported.folder, tmp_path / "model")
    return tmp_path / "model"


def reseal(folder: Path, **how: object) -> None:
    value = json.loads((folder / MANIFEST).read_text()) | how
    value.pop("seal")
    (folder / MANIFEST).write_text(seal_of(json.dumps({**value, "seal": ""}), "")[1])


def asked(model, x):
    with evaluating(model):
        z = model.backbone(x)
        return model.head(z).numpy(), pooled(z).numpy()


# the folder


def test_every_bit_of_a_folder_counts(exported, folder: Path) -> None:
    rng = np.random.default_rng(0)
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        whole = file.read_bytes()
        for bit in rng.integers(0, 8 * len(whole), 12).tolist():
            raw = bytearray(whole)
            raw[bit // 8] ^= 1 << bit % 8
            file.write_bytes(raw)
            with pytest.raises(AdaptkitError, match=file.name):
                open_folder(folder)
        file.write_bytes(whole)
    assert open_folder(folder).manifest == exported.manifest


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda f: (f / "model.onnx").unlink(), r"lacks model\.onnx"),
        (lambda f: (f / "extra.txt").write_text("x"), r"holds extra\.txt, which isn't in its list"),
        (lambda f: (f / "sub").mkdir() or (f / "sub" / "x").write_text("x"), "holds sub/x"),
        (lambda f: (f / "link").symlink_to("/etc/hostname"), "holds link"),
        (lambda f: (f / MANIFEST).unlink(), "not a model folder"),
        (lambda f: (f / MANIFEST).write_text("{"), "as JSON"),
        (lambda f: (f / MANIFEST).write_text("[1]"), "doesn't describe a model folder"),
        (lambda f: (f / MANIFEST).write_text('{"format": "other"}'), "doesn't describe a model folder"),
        (lambda f: reseal(f, version=2), "version 2, this adaptkit reads version 1: update"),
        (lambda f: reseal(f, classes="ab"), "classes is missing or of another kind"),
        (lambda f: reseal(f, files={"../x": {"sha256": "", "bytes": 0}}), "leaves the folder"),
        (lambda f: reseal(f, files={"/etc/passwd": {"sha256": "", "bytes": 0}}), "leaves the folder"),
        (lambda f: reseal(f, exports={"onnx": {"file": "/etc/passwd", "inputs": {}}}), "has no file in the list"),
        (lambda f: shutil.rmtree(f) or f.write_text("x"), "is not a folder"),
    ],
)
def test_a_folder_that_is_not_what_was_written_is_refused(spoil, told: str, folder: Path) -> None:
    spoil(folder)
    with pytest.raises(AdaptkitError, match=told):
        open_folder(folder)


def test_hidden_files_are_nobodys_and_no_checksum_is_needed_to_see_a_missing_file(folder: Path) -> None:
    (folder / ".DS_Store").write_text("x")
    open_folder(folder)
    (folder / "README.md").write_text("altered")
    open_folder(folder, verify=False)
    (folder / "README.md").unlink()
    with pytest.raises(AdaptkitError, match="lacks"):
        open_folder(folder, verify=False)


def test_pickles_are_known_by_name_and_by_content(tmp_path: Path) -> None:
    for protocol in range(2, 6):
        (tmp_path / "data").write_bytes(pickle.dumps({"a": [1, 2]}, protocol))
        assert is_pickle(tmp_path / "data"), protocol
    torch.save(torch.zeros(2), tmp_path / "renamed.onnx")
    assert is_pickle(tmp_path / "renamed.onnx")
    for n in range(1, 40):  # a header of any length, 0x0280 bytes among them, begins as a pickle does
        save_file({"x" * n: torch.zeros(1)} | {f"{i}": torch.zeros(1) for i in range(n)}, tmp_path / "weights.safetensors")
        assert not is_pickle(tmp_path / "weights.safetensors")
    (tmp_path / "x.PT").write_bytes(b"x")
    assert is_pickle(tmp_path / "x.PT")


def test_an_archive_that_cannot_be_looked_into_counts_as_a_pickle(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "whole.onnx", "w") as archive:
        archive.writestr("data/größe.txt", "x" * 50)  # a name in UTF-8
    raw = (tmp_path / "whole.onnx").read_bytes()
    assert not is_pickle(tmp_path / "whole.onnx")
    at = raw.rindex("größe".encode())  # in the list of contents
    (tmp_path / "damaged.onnx").write_bytes(raw[:at] + b"\xff" + raw[at + 1 :])
    assert is_pickle(tmp_path / "damaged.onnx")


def test_a_pickle_never_gets_into_a_folder(folder: Path) -> None:
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(AdaptkitError, match="is a pickle"), changing(folder) as part:
        (part / "weights.dat").write_bytes(pickle.dumps(print))
    assert sorted(p.name for p in folder.iterdir()) == before and open_folder(folder)
    (folder / "weights.dat").write_bytes(pickle.dumps(print))
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    entry = {"sha256": sha256(folder / "weights.dat"), "bytes": (folder / "weights.dat").stat().st_size}
    reseal(folder, files={**listed, "weights.dat": entry})
    with pytest.raises(AdaptkitError, match="is a pickle"):
        open_folder(folder)


def test_whole_or_not_at_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ZeroDivisionError), building(folder) as part:
        (part / "half").write_text("x")
        raise ZeroDivisionError
    real = Path.rename

    def full(self: Path, target: Path) -> Path:
        if self.name.endswith(".part"):
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(AdaptkitError, match=r"No space left.*untouched"), changing(folder) as part:
        (part / "more.txt").write_text("x")
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    (folder.parent / "mine").mkdir()
    (folder.parent / "mine" / "notes").write_text("x")
    with pytest.raises(AdaptkitError, match="isn't a model folder"), building(folder.parent / "mine"):
        pass
    assert (folder.parent / "mine" / "notes").read_text() == "x"


def test_files_can_be_added(folder: Path) -> None:
    with changing(folder) as part:
        (part / "reference.json").write_text("{}")
    assert "reference.json" in open_folder(folder).manifest["files"]
    assert open_folder(folder).session("onnx")(open_folder(folder).read([np.zeros((20, 20), np.uint8)])).logits.shape == (1, 2)


# reading


def test_a_folder_reads_what_the_notebook_reads(exported, model, tmp_path: Path) -> None:
    rng, files = np.random.default_rng(0), []
    for i, mode in enumerate(("RGB", "L", "RGBA", "P", "1", "LA")):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(rng.integers(0, 255, (40 + 7 * i, 61, 3)).astype(np.uint8)).convert(mode).save(files[-1])
    files.append(tmp_path / "large.jpg")
    Image.fromarray(rng.integers(0, 255, (400, 300, 3)).astype(np.uint8)).resize((1200, 900)).save(files[-1])
    usual = make_batch(Samples(files, np.zeros(len(files), np.int64)), np.arange(len(files)), spec=model.reader).x.numpy()
    for inputs in (files, [str(f) for f in files], [f.read_bytes() for f in files]):
        assert (exported.read(inputs)["images"] == usual).all()
    assert (exported.read([Image.open(f) for f in files[:-1]])["images"] == usual[:-1]).all()
    arrays = list(toy_data(12).test.items)
    assert (exported.read(arrays)["images"] == next(iter(feeds(toy_data(12).test, model)))["images"]).all()


@pytest.mark.parametrize("item", [b"", b"GIF89a", b"hello", b"P6 60000 60000 255\n", "nowhere.png", np.zeros((9, 9)), np.zeros((2, 2), np.uint8), 7, None])
def test_what_is_no_image_is_told(item, exported) -> None:
    with pytest.raises(AdaptkitError, match="can't be read"):
        exported.read([np.zeros((20, 20), np.uint8), item])


@given(st.binary(max_size=200))
@settings(max_examples=60, deadline=None)
def test_no_bytes_crash_the_reader(exported, raw: bytes) -> None:
    with pytest.raises(AdaptkitError):
        exported.read([raw])


# asking


@pytest.mark.parametrize("name", ["onnx", "onnx-half", "torch"])
def test_an_export_says_what_the_model_says(name: str, exported, model) -> None:
    session, allowed = exported.session(name), EXPORTERS[name].allowed
    for n in (1, 2, 9):
        x = model.backbone.example(n, seed=n)
        logits, features = asked(model, x)
        said = session({"images": x.numpy()})
        assert abs(said.logits - logits).max() <= allowed * abs(logits).max()
        assert abs(said.features - features).max() <= allowed * abs(features).max()
    assert exported.manifest["exports"][name]["gap"] <= allowed


def test_many_threads_get_their_own_answers(exported, model) -> None:
    session = exported.session(threads=1)
    x = model.backbone.example(16).numpy()
    whole = session({"images": x}).logits
    with ThreadPoolExecutor(8) as pool:
        each = list(pool.map(lambda i: session({"images": x[i % 16 : i % 16 + 1]}).logits[0], range(160)))
    assert max(abs(each[i] - whole[i % 16]).max() for i in range(160)) < 1e-5


@pytest.mark.parametrize("name", ["onnx", "onnx-half", "torch"])
def test_exporters_keep_their_promises(name: str) -> None:
    assert check_exporter(EXPORTERS[name]()) <= EXPORTERS[name].allowed


class Broken(Onnx):
    "An exporter with a planted fault."

    def __init__(self, fault: str) -> None:
        object.__setattr__(self, "opset", 20)
        object.__setattr__(self, "fault", fault)

    def write(self, model, path, *, samples=None):
        if self.fault == "mode":
            model.eval()
        if self.fault == "weights":
            next(model.parameters()).data.add_(1)
        if self.fault == "more":
            path.with_name("more").write_text("x")
        other = copy.deepcopy(model)
        if self.fault == "head":
            other.head[-1].reset_parameters()
        if self.fault == "statistics":
            for m in other.modules():
                if isinstance(m, torch.nn.BatchNorm2d):
                    m.reset_running_stats()
        return super().write(other, path)


@pytest.mark.parametrize(
    ("fault", "told"),
    [("mode", "has changed"), ("weights", "has changed"), ("more", "nothing else"), ("head", "isn't the model"), ("statistics", "isn't the model")],
)
def test_the_contract_bites(fault: str, told: str) -> None:
    with pytest.raises(AdaptkitError, match=told):
        check_exporter(Broken(fault))


def test_what_is_not_the_model_is_not_kept(model, tmp_path: Path) -> None:
    with pytest.raises(AdaptkitError, match="isn't the model"):
        export(model, Broken("head"), out=tmp_path / "model")
    assert not any(tmp_path.iterdir())


def test_graphs_tell_nothing_of_where_they_were_made(exported) -> None:
    raw = (exported.folder / "model.onnx").read_bytes()
    assert b".py" not in raw and b"site-packages" not in raw
    graph = onnx.load(exported.folder / "model.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert not [n for n in graph.graph.node if n.op_type == "BatchNormalization"] and graph.opset_import[0].version == 20
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"


def test_numbers_too_large_for_half_precision_stay() -> None:
    large = np.full(100, 2 * HALF, np.float32)
    tensors = [onnx.numpy_helper.from_array(a, n) for n, a in {"large": large, "small": large / 1e5, "odd": large * np.nan}.items()]
    graph = onnx.helper.make_graph([], "g", [], [], tensors)
    made = with_half_weights(onnx.helper.make_model(graph)).graph
    assert [t.name for t in made.initializer] == ["large", "small.half", "odd"] and len(made.node) == 1


def test_archives_that_could_run_code_are_refused(exported, tmp_path: Path) -> None:
    for old, new in ((b'"use_pickle": false', b'"use_pickle":  true'), (b"Symbol('", b"exec('"), (b"Symbol('", b"a.b('"), (b"Symbol('", b"eval(chr(95))+Symbol('"), (b'"use_pickle": false', b'"use\\u005fpickle": true')):
        with zipfile.ZipFile(exported.folder / "model.pt2") as a, zipfile.ZipFile(tmp_path / "bad.pt2", "w") as b:
            for item in a.infolist():
                raw = a.read(item)
                b.writestr(item.filename, raw.replace(old, new) if item.filename.endswith(".json") else raw)
        assert archive_trouble(tmp_path / "bad.pt2")
        with pytest.raises(AdaptkitError, match="isn't opened"):
            Torch().open(tmp_path / "bad.pt2")
    assert not archive_trouble(exported.folder / "model.pt2")
    with pytest.raises(AdaptkitError, match="no threads of its own"):
        Torch().open(exported.folder / "model.pt2", threads=2)


def test_bad_requests_are_told(exported) -> None:
    session, x = exported.session(threads=1), np.zeros((2, 3, 18, 18), np.float32)
    for inputs in ({}, {"image": x}, {"images": x[:, :1]}, {"images": x + 2}, {"images": x - np.inf}, {"images": x[:0]}, {"images": x.astype(np.uint8)}):
        with pytest.raises(AdaptkitError, match="can't be asked"):
            session(inputs)
    for act, told in ((lambda: exported.session("onxx"), "Did you mean 'onnx'"), (lambda: exported.session(threads=-1), "threads is -1")):
        with pytest.raises(AdaptkitError, match=told):
            act()


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))
def test_a_letter_is_one_length(n: int, length: int, other: int) -> None:
    told = misfit({"ids": np.ones((n, length), np.int64), "mask": np.ones((n, other), np.int64)}, takes_of("text", 0))
    assert bool(told) == (length != other)


# texts, and whole runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place, data = tmp_path_factory.mktemp("texts"), load_data("support_topics")
    plan = Plan(epochs=1, batch_size=32, views=1, accelerator="cpu")
    quiet = {"observers": [], "cache": place / "cache"}
    return fit(build_model("bag_of_embeddings", data, size=16), data, FineTune(depth=1), plan=plan, out=place / "run", **quiet)


def test_a_run_of_texts_goes_all_the_way(run) -> None:
    folder, data = export(run), load_data("support_topics")
    texts = [data.test.text(i) for i in range(12)] + ["", "很好"]
    samples = Texts(strings(texts), np.zeros(len(texts), np.int64))
    logits, features = asked(run.model, make_batch(samples, np.arange(len(texts)), spec=run.model.reader).x)
    said = folder.session()(folder.read(texts))
    assert np.allclose(said.logits, logits, atol=1e-4) and np.allclose(said.features, features, atol=1e-4)
    one = folder.session()(folder.read([texts[3].encode()])).logits[0]
    assert np.allclose(one, logits[3], atol=1e-4)
    assert folder.temperature and folder.manifest["source"]["data"]["fingerprint"] == data.fingerprint
    p = folder.probabilities(said.logits)
    assert np.allclose(p.sum(1), 1, atol=1e-5) and not np.allclose(p, np.exp(logits) / np.exp(logits).sum(1, keepdims=True), atol=1e-3)
    for bad, told in (([Path("x")], "give the text itself"), ([b"\xff"], "UTF-8"), ([], "nothing to read")):
        with pytest.raises(AdaptkitError, match=told):
            folder.read(bad)


def test_exports_are_added_and_certified(run) -> None:
    export(run)
    folder = export(run.folder / "model", ["onnx-half", OnnxHalf(opset=18)])
    assert [*folder.manifest["exports"]] == ["onnx", "onnx-half"] and folder.manifest["default"] == "onnx"
    found = certify(run, n=40, also={"merged": run.model, "another": build_model("bag_of_embeddings", load_data("support_topics"), size=16, seed=5)})
    assert [s.name for s in found.steps][4:] == ["merged", "another", "in the model folder", "export onnx", "export onnx-half"]
    assert [s.name for s in found.steps if not s.passed] == ["another"]
    # the file of another network in the place of the export: whole, sealed, and wrong
    other = build_model("bag_of_embeddings", load_data("support_topics"), size=16, seed=5)
    with changing(folder.folder) as part:
        Onnx().write(other, part / "model.onnx")
    some = load_data("support_topics").valid.take(np.arange(30))
    before = witness(run.model, some)
    assert [s.name for s in folder_steps(folder.folder, before, far_witnesses(forms_in(folder.folder), some)) if not s.passed] == ["export onnx"]
    with changing(folder.folder) as part:
        value = json.loads((part / MANIFEST).read_text())
        (part / MANIFEST).write_text(json.dumps({**value, "classes": value["classes"][::-1], "preprocess": {"size": 5}}))
    told = {c for s in folder_steps(folder.folder, before, far_witnesses(forms_in(folder.folder), some)) if s.name == "export onnx-half" for c in s.changed}
    assert any("another order" in c for c in told) and any("size is 5" in c for c in told) and any("other arrays" in c for c in told)


def test_bad_exports_are_refused(run, model, tmp_path: Path) -> None:
    for asked_for, how, told in (
        ((run, "onxx"), {}, "Did you mean 'onnx'"),
        ((run, []), {}, "nothing to export"),
        ((model,), {}, "Say with out"),
        ((run,), {"temperature": -1}, "above 0"),
        ((run,), {"data": toy_data(12)}, "fingerprint"),
        ((tmp_path,), {}, "not a run folder"),
        ((model, Onnx(opset=18)), {"out": tmp_path / "x" / ".." / "y", "temperature": 0}, "above 0"),
    ):
        with pytest.raises(AdaptkitError, match=told):
            export(*asked_for, **how)
    with pytest.raises(AdaptkitError, match="18 or more"):
        Onnx(opset=9)
    assert not any(tmp_path.iterdir())


def test_the_network_comes_back_and_the_model_is_left_alone(exported, model) -> None:
    back = exported.model()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in back.state_dict().items()) and not back.training
    with pytest.raises(AdaptkitError, match="made by build_model"):
        bare = copy.deepcopy(model)
        bare.config = {}
        export(bare, out=exported.folder.parent / "other")


# the card


SCORES = {"split": "test", "scores": {"accuracy": {"value": 0.9, "low": 0.85, "high": 0.94, "n": 100}}, "controls": {}, "remarks": []}


def described(**how: object) -> dict:
    base = {"name": "m", "kind": "image", "classes": ["a", "b"], "revision": "0" * 12, "temperature": None, "exports": {}, "metrics": {}, "source": {}}
    return base | how


def test_cards_have_front_matter_and_invent_nothing() -> None:
    bare = card(described())
    assert "wasn't evaluated" in bare and "not recorded" in bare and "it wasn't measured" in bare and "model-index" not in bare
    full = card(described(metrics=SCORES, source={"energy": {"kWh": 0.2}, "seconds": 3.0, "method": {"name": "x"}}), licence="CC BY 4.0")
    head = yaml.safe_load(full.split("---")[1])
    metric = head["model-index"][0]["results"][0]["metrics"][0]
    assert head["license"] == "cc-by-4.0" and metric["value"] == 0.9 and "0.850 to 0.940, n = 100" in metric["name"]
    assert "kWh 0.2" in full and "0.850 to 0.940" in full.split("## Results")[1]
    assert licence_id("my own") == {"license": "other", "license_name": "my-own"}


@given(st.dictionaries(st.sampled_from(["a", "b", "c"]), st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])) | st.integers() | st.booleans() | st.none(), min_size=1))
def test_yaml_says_what_it_was_told(value: dict) -> None:
    nested = {"x": value, "list": [value, {"y": 1}]}
    assert yaml.safe_load("\n".join(yaml_lines(nested))) == nested


def test_names_of_classes_are_no_markup() -> None:
    text = card(described(classes=["<script>alert(1)</script>", "a|b\n# head", "`x`"]))
    assert "<script>" not in text and "\n# head" not in text and plain("a_b") == "a\\_b"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientnet_lite0", "minilm", "timm/vit_tiny_patch16_224"])
def test_larger_networks_go_through(name: str, tmp_path: Path) -> None:
    network = build_model(name, Named(("a", "b", "c")), pretrained=not name.startswith("timm"), seed=0)
    folder = export(network, "onnx", out=tmp_path / "model")
    x = network.backbone.example(2, seed=7)
    feed = {"images": x.numpy()} if x.ndim == 4 else {"ids": x[:, 0, :40].numpy(), "mask": x[:, 1, :40].numpy()}
    logits, _ = asked(network, x if x.ndim == 4 else x[:, :, :40])
    assert abs(folder.session()(feed).logits - logits).max() <= 1e-4 * abs(logits).max()
