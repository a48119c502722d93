"""Attacks on texts: what may stand in a word's place, the order of the search, and the limits it keeps."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from adaptkit.core.registry import AdaptkitError
from adaptkit.data.texts import Texts, strings
from adaptkit.heads.heads import Named, build_model
from adaptkit.models.backbones import load_backbone
from adaptkit.robustness.words import (
    EDITS,
    LOOKALIKES,
    WordSwaps,
    asked,
    by_weight,
    cut,
    lookalikes,
    robust_texts,
    strongest,
    synonyms,
    table_of,
    typos,
)

GOOD = {"good": 2.0, "fine": 1.0}


def rule(texts: Sequence[str]) -> Tensor:
    "A classifier: class 1 if good words outweigh 0.5."
    weights = torch.tensor([sum(GOOD.get(w, 0.0) for w in cut(t)) for t in texts])
    return torch.stack([torch.full_like(weights, 0.5), weights], 1)


def same(texts: Sequence[str]) -> Tensor:
    "Everything means the same."
    return torch.ones(len(texts), 1)


@pytest.mark.parametrize("text", ["", "one", "  It's 5 o'clock!\n", "naïve — 你好, wörld", "a" * 300, "🙂 ok"])
def test_a_text_that_was_cut_is_put_together_again(text: str) -> None:
    assert "".join(cut(text)) == text


@pytest.mark.parametrize("word", ["word", "invoice", "letter", "aaaa", "Straße"])
def test_typos_keep_the_ends_and_the_letters(word: str) -> None:
    found = typos(word)
    assert len(found) == len(set(found)) and word not in found and (found or word == "aaaa")
    for other in found:
        assert other[0] == word[0] and other[-1] == word[-1]
        assert sorted(other) == sorted(word) or len(other) == len(word) - 1


@pytest.mark.parametrize("name", list(EDITS))
@pytest.mark.parametrize("word", ["", "a", "the", "space", "42"])
def test_an_edit_never_gives_the_word_itself(name: str, word: str) -> None:
    assert word not in EDITS[name](word)


def test_lookalikes_are_of_another_alphabet_and_one_at_a_time() -> None:
    assert all("CYRILLIC" in unicodedata.name(c) for c in LOOKALIKES.values())
    for other in lookalikes("space"):
        assert sum(a != b for a, b in zip("space", other, strict=True)) == 1
    assert len(lookalikes("space")) == 5 and lookalikes("TTT") == []


def test_the_word_that_matters_most_comes_first() -> None:
    words = cut("a fine and good day")
    assert [words[i] for i in by_weight(rule, words, 1)][:2] == ["good", "fine"]
    assert by_weight(rule, cut("?!"), 1) == [] and by_weight(rule, [], 1) == []


def test_it_stops_when_the_text_has_fallen_and_touches_nothing_else() -> None:
    assert WordSwaps(lambda w: [w + "ish"], share=1.0).rewrite(rule, "a good day", 1, sense=same) == "a goodish day"


def test_no_more_words_are_replaced_than_allowed() -> None:
    text = "good good good good good good good good good good"
    changed = [sum(w == "bad" for w in cut(WordSwaps(lambda w: ["bad"], share=s).rewrite(rule, text, 1, sense=same))) for s in (0.01, 0.3, 0.5)]
    assert changed == [1, 3, 5]


def test_what_changes_the_meaning_is_left_and_the_next_best_taken() -> None:
    def sense(texts: Sequence[str]) -> Tensor:
        return torch.stack([torch.tensor([0.0, 1.0] if "bad" in t else [1.0, 0.0]) for t in texts])

    tried = WordSwaps(lambda w: ["bad", "fine"] if w == "good" else []).rewrite(rule, "a good day", 1, sense=sense)
    assert tried == "a fine day"  # weaker, but it says the same
    assert WordSwaps(lambda w: ["bad"]).rewrite(rule, "a good day", 1, sense=sense) == "a good day"
    assert WordSwaps(lambda w: ["bad"], least=-1.0).rewrite(rule, "a good day", 1, sense=sense) == "a bad day"


def test_the_dear_question_is_asked_for_those_only_that_would_help() -> None:
    asked_for: list[str] = []

    def keeps(texts: Sequence[str]) -> list[bool]:
        asked_for.extend(texts)
        return [True] * len(texts)

    tried = [[w] for w in ("good", "fine", "so", "good", "fine")]
    best = strongest(rule, tried, 1, above=-1.5, keeps=keeps)
    assert best == (["so"], 0.5) and asked_for == ["so", "fine", "fine"]  # "good" would not have helped
    assert strongest(rule, [["good"]], 1, above=-1.5, keeps=keeps) is None and strongest(rule, [], 1, above=0.0, keeps=keeps) is None


def test_synonyms_are_neighbours_nearest_first_and_few() -> None:
    table = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.5, 0.5], [-1.0, 0.0]]), dim=1)
    near = synonyms(["up", "upper", "middle", "down"], table, most=2, least=0.4)
    assert near("up") == ["upper", "middle"] and near("UP") == near("up") and near("down") == [] and near("unheard") == []


@pytest.mark.slow
def test_an_encoder_says_what_it_knows_of_words() -> None:
    words, table = table_of(load_backbone("minilm", size=16))
    assert len(words) == len(set(words)) == len(table) > 10_000
    assert torch.allclose(table.norm(dim=1), torch.ones(len(table)), atol=1e-4)
    assert "purchase" in synonyms(words, table)("buy")
    again = table_of(load_backbone("minilm", size=16))
    assert again[0] == words and torch.equal(again[1], table)  # in one order always


@pytest.fixture(scope="module")
def texts() -> Texts:
    rng = np.random.default_rng(0)
    many = [" ".join(rng.choice(["alpha", "bravo", "carol", "delta", "extra"], 6)) for _ in range(12)]
    return Texts(strings(many), np.arange(12) % 2)


def test_what_never_was_right_is_lost_and_not_attacked(texts: Texts) -> None:
    model = build_model("bag_of_embeddings", Named(("a", "b")), seed=0)
    found, pairs = robust_texts(model, texts, WordSwaps(typos, least=-1.0, share=1.0), sense=same, seed=0)
    right = asked(model, model.reader)([texts.text(i) for i in range(12)]).argmax(1).numpy() == texts.labels
    assert found.n == 12 and found.clean == right.mean() and found.accuracy <= found.clean and found.low <= found.accuracy <= found.high
    assert all(a == b for (a, b), fine in zip(pairs, right, strict=True) if not fine)
    assert found.fallen[~right].all() and found.accuracy == (~found.fallen).mean()
    again, repeated = robust_texts(model, texts, WordSwaps(typos, least=-1.0, share=1.0), sense=same, seed=0)
    assert repeated == pairs and again.accuracy == found.accuracy
    few, _ = robust_texts(model, texts, WordSwaps(typos), sense=same, n=5, seed=1)
    assert few.n == 5 and len(set(few.rows)) == 5


def test_a_model_gets_its_mode_back(texts: Texts) -> None:
    model = build_model("bag_of_embeddings", Named(("a", "b")), seed=0).train()
    robust_texts(model, texts, WordSwaps(typos), sense=same, n=3)
    assert model.training and all(m.training for m in model.modules()) and all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("options, words", [({"least": 2.0}, "-1 to 1"), ({"share": 0.0}, "above 0"), ({"share": 1.5}, "up to 1")])
def test_settings_that_make_no_sense(options: dict[str, float], words: str) -> None:
    with pytest.raises(AdaptkitError, match=words):
        WordSwaps(**options)


def test_a_network_without_words_is_refused() -> None:
    with pytest.raises(AdaptkitError, match="has no vocabulary of words"):
        table_of(load_backbone("character_cnn"))
