"""Recipes: every choice is kept, and makes the same model again, also as a notebook executed by papermill."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import papermill
import pytest
from PIL import Image

from adaptkit.core.registry import AdaptkitError
from adaptkit.data.sources import load_data
from adaptkit.heads.heads import load_model
from adaptkit.notebooks.parameters import declared
from adaptkit.notebooks.records import records
from adaptkit.training.control import Action
from adaptkit.training.session import fingerprint
from adaptkit.widgets.offers import (
    METHODS,
    STRENGTHENINGS,
    FineTune,
    Strengthening,
    make_method,
    method_offers,
    strengthened,
    strengthening_offers,
)
from adaptkit.widgets.recipe import Recipe, built, completed, finished, loaded, method_of, plan_of, prepared, reproduce
from adaptkit.widgets.reproduction import deliver, notebook, write_notebook
from adaptkit.widgets.training import TrainingPanel

SETTINGS = {"depth": 3, "rate": 0.01, "head_rate": 0.01}


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder of digits."
    folder, digits = tmp_path_factory.mktemp("data") / "photos", load_data("digits")
    for i in range(120):
        place = folder / str(digits.train.labels[i] % 3) / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.train.image(i)).save(place)
    return folder


@pytest.fixture
def recipe(sent: Path) -> Recipe:
    return Recipe(str(sent), settings=SETTINGS, epochs=3, batch_size=16, views=2, seed=3)


def test_json_round_trip(recipe: Recipe) -> None:
    whole = replace(recipe, actions=({"step": 3, "name": "rate", "value": 0.5},), settings={**SETTINGS, "mix": {"kind": "mixup"}})
    assert Recipe.from_json(json.loads(json.dumps(whole.to_json()))) == whole


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"epochs": 0}, "at least 1"),
        ({"epochs": True}, "should be of another kind"),
        ({"epochs": "6"}, "should be of another kind"),
        ({"head": "lineal"}, "Did you mean 'linear'"),
        ({"method": "magic"}, "Unknown method"),
        ({"leaks": "some"}, "Unknown leaks"),
        ({"sead": 1}, "Did you mean 'seed'"),
        ({"actions": 3}, "damaged|iterable"),
    ],
)
def test_a_bad_recipe_is_refused_by_name(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises((AdaptkitError, TypeError), match=words):
        Recipe.from_json(wrong)


def test_what_was_done_by_hand_is_part_of_it_and_repeats_bit_by_bit(recipe: Recipe, tmp_path: Path) -> None:
    data = prepared(recipe, loaded(recipe))
    start = built(recipe, data)
    hand = [Action(2, "rate", 0.3), Action(4, "momentum", 0.5), Action(6, "go_back"), Action(8, "stop", "enough")]
    panel = TrainingPanel(start, data, method_of(recipe), plan=plan_of(recipe, data.kind), out=tmp_path / "hand", replay=hand)
    outcome = finished(recipe, panel.wait(), data=data, start=start)
    whole = completed(recipe, outcome.run)
    assert [a["name"] for a in whole.actions] == ["rate", "momentum", "go_back", "stop"] and whole.fingerprint == data.fingerprint
    again = reproduce(whole, tmp_path / "again")
    assert fingerprint(again.run.model) == fingerprint(outcome.run.model)
    assert again.evaluation.scores == outcome.evaluation.scores
    without = reproduce(replace(whole, actions=()), tmp_path / "without")
    assert fingerprint(without.run.model) != fingerprint(outcome.run.model)


def test_other_data_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(AdaptkitError, match="other data than this recipe"):
        reproduce(replace(recipe, fingerprint="0" * 16), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_zip_holds_all_that_the_notebook_needs(recipe: Recipe, sent: Path, tmp_path: Path) -> None:
    recipe = replace(recipe, settings={**SETTINGS, "smoothing": 0.1, "mix": {"kind": "mixup", "where": "features", "strength": 0.2}})
    outcome = reproduce(recipe, tmp_path / "run")
    files = deliver(completed(recipe, outcome.run), outcome, into=tmp_path / "home", data=sent)
    with zipfile.ZipFile(files["model.zip"]) as archive:
        archive.extractall(tmp_path / "elsewhere")
    home = tmp_path / "elsewhere"
    assert fingerprint(load_model(home / "model")) == fingerprint(outcome.run.model)
    executed = papermill.execute_notebook(home / "reproduce.ipynb", home / "executed.ipynb", cwd=str(home), progress_bar=False)
    accuracy = outcome.evaluation.scores["accuracy"].value
    told = records(executed)["test_accuracy"]
    assert told.value == accuracy and set(told.trivial) == {"majority class", "untrained head"}
    assert fingerprint(load_model(home / "reproduced")) == fingerprint(outcome.run.model)
    assert str(tmp_path) not in (home / "reproduce.ipynb").read_text()
    words = (home / "README.txt").read_text()
    code = "\n".join(line[4:] for line in words.split("\n") if line.startswith("    "))
    shutil.copytree(sent / "1", home / "new")
    said = subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(said) == len(list((sent / "1").iterdir())) and {line.split()[1] for line in said} <= {"0", "1", "2"}


def test_the_notebook_says_where_its_data_are(recipe: Recipe, tmp_path: Path) -> None:
    words = {name: notebook(replace(recipe, data=data), 0.5, packed=packed).cells[0].source for name, data, packed in (("name", "digits", False), ("packed", "data", True), ("server", "/srv/photos", False))}
    assert "load by their name" in words["name"] and "beside this notebook" in words["packed"] and "expected at `/srv/photos`" in words["server"]
    path = write_notebook(notebook(recipe, 0.5), tmp_path / "page.ipynb")
    found = declared(path)
    assert set(Recipe().to_json()) | {"out"} == set(found) and found["epochs"].default == 3


def test_offers_grow_by_themselves_and_leave_out_what_needs_something() -> None:
    try:
        METHODS.register("test_calm")(lambda depth=1: FineTune(depth=depth))
        METHODS.register("test_needy")(lambda teacher: FineTune())
        STRENGTHENINGS.register("test_more")(Strengthening("More.", lambda data: {"decay": 0.2}, kind="text"))
        names = [o.name for o in method_offers()]
        assert names[0] == "finetune" and "test_calm" in names and "test_needy" not in names
        assert "test_more" in {o.name for o in strengthening_offers("finetune", "text")}
        assert "test_more" not in {o.name for o in strengthening_offers("finetune", "image")}
    finally:
        for registry, name in ((METHODS, "test_calm"), (METHODS, "test_needy"), (STRENGTHENINGS, "test_more")):
            registry.items.pop(name, None)


def test_settings_become_the_method_they_were(sent: Path) -> None:
    data = load_data(sent)
    every = strengthened({"depth": 1}, [o.name for o in strengthening_offers("finetune", "image")], data=data)
    method = make_method("finetune", json.loads(json.dumps(every)))
    assert isinstance(method, FineTune) and method.mix is not None and len(method.weights) == 3 and method.pull and method.average
    with pytest.raises(AdaptkitError, match="can't be made with"):
        make_method("finetune", {"deepness": 3})
    with pytest.raises(AdaptkitError, match="Nothing was chosen"):
        strengthened({}, [], data=data)
