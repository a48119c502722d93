"""The Studio without a browser: the whole way, closed steps, going back, bad input, and a page of widgets that follows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import comm
import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

from adaptkit.core.registry import AdaptkitError
from adaptkit.data.sources import load_data
from adaptkit.widgets.controls import ORDER, PRESS
from adaptkit.widgets.guide import Guide, attend, press
from adaptkit.widgets.interrupted import before_shutdown
from adaptkit.widgets.notes import NAME, broken, find_notes, told
from adaptkit.widgets.service import SAID, VISITOR, Service, Terms, abandoned, arrivals, arrive, put_in, refusal
from adaptkit.widgets.serving import Door, serve
from adaptkit.widgets.still import STATE, bundle
from adaptkit.widgets.studio import Studio, begin_anew, collect, go_on, note
from adaptkit.widgets.uploads import Limits
from adaptkit.widgets.visits import begin_visit, find_visit, how_it_is, last_visit, room

@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder with a folder of digits in it."
    root, digits = tmp_path_factory.mktemp("server"), load_data("digits")
    for i in range(100):
        place = root / "photos" / str(digits.train.labels[i] % 3) / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.train.image(i)).save(place)
    return root / "photos"


@pytest.fixture
def studio(tmp_path: Path, photos: Path) -> Studio:
    return Studio(folder=tmp_path / "mine", root=photos.parent)


def three_steps(studio: Studio) -> Studio:
    studio.choose_folder("photos")
    studio.choose_model("small_cnn")
    studio.choose_head("mlp")
    return studio


def test_all_the_way(studio: Studio) -> None:
    assert [s["chosen"] for s in studio.state["steps"]] == [""] * 7
    foreseen = three_steps(studio).choose_training(epochs=2, batch_size=16, mirror=False)
    assert foreseen.seconds > 0 and foreseen.learning == foreseen.parameters  # it has learned nothing, so all of it learns
    studio.train()
    plain = studio.wait()
    studio.strengthen("smoothing", "balance")
    strong = studio.wait()
    assert (plain.with_what, strong.with_what) == ("plain", "with smoothing, weights") and strong.recipe.settings["smoothing"] == 0.1
    assert studio.keep(1) is strong
    outcome = studio.test()
    files = studio.take_home()
    assert set(files) == {"model.zip", "report.html", "reproduce.ipynb"} and all(p.stat().st_size for p in files.values())
    state = studio.state
    json.dumps(state, allow_nan=False)
    assert state["done"] == 7 and all(s["chosen"] for s in state["steps"]) and state["accuracy"] == outcome.evaluation.scores["accuracy"].value
    assert state["recipe"]["settings"]["smoothing"] == 0.1
    assert studio.keep(0) is plain and "smoothing" not in studio.state["recipe"]["settings"] and studio.known.outcome is None


def test_a_step_is_closed_until_the_one_before_is_done(studio: Studio) -> None:
    steps = [lambda: studio.choose_model("small_cnn"), studio.choose_head, lambda: studio.choose_training(epochs=1), studio.keep, studio.test, studio.take_home]
    for step in steps:
        with pytest.raises(AdaptkitError, match=r"is closed: finish step 1 \(Choose data\) first"):
            step()
    with pytest.raises(AdaptkitError, match="begin with step 1|no panel|finish|Say first"):
        studio.train()
    three_steps(studio)
    with pytest.raises(AdaptkitError, match="Say first how to train"):
        studio.train()


def test_going_back_forgets_what_came_after(studio: Studio) -> None:
    three_steps(studio).choose_training(epochs=1, batch_size=16)
    studio.train()
    studio.wait()
    studio.choose_head("linear")
    assert studio.done == 3 and studio.known.trained == [] and studio.known.forecast is None and studio.known.recipe.actions == ()
    studio.choose_folder("photos", leaks="keep")
    assert studio.done == 1 and studio.known.backbone is None and studio.known.recipe.fingerprint == ""


def test_nothing_changes_while_something_trains(studio: Studio) -> None:
    three_steps(studio).choose_training(epochs=40, batch_size=16)
    panel = studio.train()
    panel.step()
    while panel.state != "paused":
        time.sleep(0.01)
    for act in (lambda: studio.choose_folder("photos"), studio.train, lambda: studio.strengthen("smoothing")):
        with pytest.raises(AdaptkitError, match="A training is going on|is closed"):
            act()
    panel.stop()
    assert studio.wait().run.record["status"] == "stopped" and studio.done == 4
    assert [a["name"] for a in studio.known.trained[0].recipe.actions] == ["stop"]


@pytest.mark.parametrize(
    ("path", "words"),
    [("../", "leaves the folder|holds|class"), ("/etc", "leaves the folder"), ("nothing", "no folder"), ("", "No folder was chosen"), ("photos/../../x", "leaves the folder")],
)
def test_folders_are_chosen_below_the_root_only(studio: Studio, path: str, words: str) -> None:
    with pytest.raises(AdaptkitError, match=words):
        studio.choose_folder(path)
    assert studio.done == 0 and studio.known.data is None


def test_wrong_names(studio: Studio) -> None:
    with pytest.raises(AdaptkitError, match="Unknown data set 'hf:imdb'"):
        studio.choose_data("hf:imdb")
    with pytest.raises(AdaptkitError, match="Did you mean 'digits'"):
        studio.choose_data("digitz")
    studio.choose_folder("photos")
    for name, words in (("small_cn", "Did you mean 'small_cnn'"), ("bag_of_embeddings", "reads texts, and your data are images"), ("/etc/passwd", "Unknown network")):
        with pytest.raises(AdaptkitError, match=words):
            studio.choose_model(name)
    studio.choose_model("small_cnn")
    with pytest.raises(AdaptkitError, match="Unknown head"):
        studio.choose_head("lineal")
    studio.choose_head()
    with pytest.raises(AdaptkitError, match="Unknown setting"):
        studio.choose_training(epoch=3)
    assert studio.done == 3


def test_a_bad_upload_leaves_nothing_and_the_studio_goes_on(studio: Studio, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "not.zip").write_bytes(b"hello")
    one_class = shutil.make_archive(str(tmp_path / "one"), "zip", photos / "0")
    for path, words in ((tmp_path / "not.zip", "not a zip"), (Path(one_class), "no class folders")):
        with pytest.raises(AdaptkitError, match=words) as told:
            studio.upload(path, path.name)
        assert str(tmp_path) not in str(told.value)
        assert not list(studio.folder.glob("*upload*")) and studio.done == 0
    packed = shutil.make_archive(str(tmp_path / "all"), "zip", photos.parent)
    studio.upload(packed, "all.zip")
    assert studio.done == 1 and studio.known.data is not None and len(studio.known.data.classes) == 3
    studio.choose_folder("photos")
    assert not list(studio.folder.glob("*upload*"))


# --- coming back -------------------------------------------------------------------------------------


def test_every_step_is_found_again(studio: Studio) -> None:
    def back() -> Studio:
        "What another kernel finds; the first one goes on as if nothing had been."
        note(studio)
        found = Studio(folder=studio.folder, root=studio.root)
        go_on(found)
        return found

    assert studio.left is None
    three_steps(studio)
    found = back()
    assert found.done == 3 and found.state == studio.state and found.known.panel is None
    studio.choose_training(epochs=2, batch_size=16, mirror=False)
    studio.train()
    found = back()
    assert found.known.panel is not None and found.known.panel.left is None and found.known.panel.order.out == studio.folder / "run-1"
    studio.wait()
    found = back()
    assert found.done == 4 and found.known.trained[0].accuracy == studio.known.trained[0].accuracy
    studio.strengthen("smoothing")
    studio.wait()
    studio.keep(0)
    found = back()
    assert found.state["steps"] == studio.state["steps"] and found.known.kept is found.known.trained[0] and found.begun == studio.begun
    studio.test()
    studio.take_home()
    found = back()
    assert found.done == 5 and found.test().evaluation.scores == studio.known.outcome.evaluation.scores
    assert found.strengthen("balance").order.out == studio.folder / "run-3"


def test_data_that_were_sent_are_found_again_and_others_are_refused(studio: Studio, photos: Path, tmp_path: Path) -> None:
    packed = shutil.make_archive(str(tmp_path / "all"), "zip", photos.parent)
    studio.upload(packed, "all.zip")
    note(studio)
    found = Studio(folder=studio.folder)
    go_on(found)
    assert found.known.sent == studio.known.sent and found.known.data.fingerprint == studio.known.data.fingerprint
    shutil.rmtree(next(found.known.sent.rglob("2")))
    found = Studio(folder=studio.folder)
    with pytest.raises(AdaptkitError, match="others than they were"):
        go_on(found)
    assert found.done == 0 and found.known.data is None and found.left is not None
    begin_anew(found)
    assert found.left is None and list(studio.folder.iterdir()) == []
    with pytest.raises(AdaptkitError, match="nothing to go on with"):
        go_on(found)


def test_damaged_notes_are_told_of(tmp_path: Path) -> None:
    for text in ("{", "{}", '{"done": 1, "forecast": null, "trained": [], "recipe": {"head": "no"}, "words": []}'):
        (tmp_path / NAME).write_text(text)
        with pytest.raises(AdaptkitError, match="choices.json|Unknown head"):
            Studio(folder=tmp_path)


def test_whoever_comes_back_is_asked_first(guide: Guide, photos: Path, tmp_path: Path) -> None:
    guide.page.controls["source"].value = "folder"
    press(guide, 1, "look")
    guide.page.controls["model"].value = "small_cnn"
    press(guide, 2, "use_model")
    again = Guide(Studio(folder=guide.studio.folder, root=photos.parent), service=guide.service)
    assert again.widget and again.page.steps[0].layout.display == "" and again.page.steps[1].layout.display == "none"
    assert "Welcome back" in again.page.shown["head0"].value and "small_cnn" in again.page.shown["head0"].value
    with pytest.raises(AdaptkitError, match="Say first whether"):
        press(again, 1, "look")
    shutil.copy(shutil.make_archive(str(tmp_path / "all"), "zip", photos.parent), again.service.place / "in/part")
    put_in(again.service.place, again.service.place / "in/part", "all.zip")
    attend(again)
    assert again.studio.done == 0 and len(list((again.service.place / "in").glob("*.sent"))) == 1  # it waits for the answer, too
    for sent in (again.service.place / "in").iterdir():
        sent.unlink()
    press(again, 0, "back")
    c = again.page.controls
    assert not again.refusals and again.studio.done == 2 and again.page.steps[0].layout.display == "none"
    assert (c["source"].value, c["folder"].value, c["model"].value) == ("folder", "photos", "small_cnn")
    assert "Three convolutions" in again.page.shown["offer2"].value
    third = Guide(Studio(folder=guide.studio.folder, root=photos.parent), service=guide.service)
    assert third.widget
    press(third, 0, "anew")
    assert third.studio.done == 0 and third.page.steps[1].layout.display == "" and find_notes(guide.studio.folder) is None


IN_A_KERNEL = """
from adaptkit.widgets.guide import studio_page
from adaptkit.widgets.studio import note
guide = studio_page()
studio = guide.studio
studio.choose_folder("photos")
studio.choose_model("small_cnn")
studio.choose_head()
studio.choose_training(epochs=40, batch_size=8, mirror=False)
panel = studio.train()
note(studio)
panel.start()
while panel.control.actions or not (studio.folder / "run-1/checkpoint.safetensors").exists():
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_a_kernel_that_is_asked_to_end_writes_where_it_was_and_one_that_is_killed_can_be_gone_on_with(tmp_path: Path, photos: Path, killed: bool) -> None:
    from jupyter_client.manager import start_new_kernel

    server = Terms(str(tmp_path), "/studio/", str(photos.parent)).to_environment()
    manager, client = start_new_kernel(env={**os.environ, **server, VISITOR: "k" * 32, "VOILA_KERNEL_ID": "one"})
    manager.shutdown_wait_time = 20
    reply = client.execute_interactive(IN_A_KERNEL, timeout=120)
    assert reply["content"]["status"] == "ok", reply
    client.stop_channels()
    manager.shutdown_kernel(now=killed)
    place = tmp_path / ("k" * 32) / "work"
    left = broken(place, find_notes(place))
    assert 0 < left.step < left.total and (killed or left.step == left.reached)
    assert "it can be resumed from there" in " ".join(told(place, find_notes(place)))
    assert abandoned(tmp_path, {"one"}) == [] and abandoned(tmp_path, set()) == [place.parent] and abandoned(tmp_path, set(), seconds=60) == []


# --- the page ----------------------------------------------------------------------------------------


@pytest.fixture
def guide(tmp_path: Path, photos: Path):
    with patch("comm.create_comm", comm.DummyComm):
        desk = Terms(str(tmp_path / "desk"), "/studio/", str(photos.parent))
        service = arrive({**desk.to_environment(), "VOILA_KERNEL_ID": "k"})
        made = Guide(Studio(folder=service.place / "work", root=photos.parent), service=service)
        assert made.widget
        yield made


AHEAD = """
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from adaptkit.widgets.interrupted import before_shutdown

before_shutdown(lambda: Path("last").write_text(ThreadPoolExecutor(1).submit(lambda: "still at work").result()))
"""


def test_before_a_kernel_ends_its_threads_still_work(tmp_path: Path) -> None:
    from jupyter_client.manager import start_new_kernel

    assert not before_shutdown(lambda: None)  # this process is no kernel
    manager, client = start_new_kernel(cwd=str(tmp_path))
    client.execute_interactive(AHEAD, timeout=60)
    client.stop_channels()
    manager.shutdown_kernel()
    assert (tmp_path / "last").read_text() == "still at work"


def test_the_page_follows_a_press_a_file_and_a_program(guide: Guide, photos: Path, tmp_path: Path) -> None:
    page = guide.page
    press(guide, 6, "test")
    assert "Step 6 is closed" in guide.refusals[6] and "Step 6 is closed" in page.shown["said6"].value
    packed = Path(shutil.make_archive(str(tmp_path / "all"), "zip", photos.parent))
    shutil.move(packed, guide.service.place / "in/part")
    put_in(guide.service.place, guide.service.place / "in/part", "all.zip")
    attend(guide)
    assert guide.studio.done == 1 and "(your turn)" in page.shown["head2"].value and not list((guide.service.place / "in").iterdir())
    page.controls["model"].value = "small_cnn"
    press(guide, 2, "use_model")
    press(guide, 3, "use_head")
    page.controls["epochs"].value = 1
    press(guide, 4, "price")
    assert not guide.refusals and "It will take about" in page.shown["found4"].value and page.places["panel4"].children
    guide.studio.known.panel.desk.buttons["start"].click()
    guide.studio.known.panel.training.join()
    attend(guide)
    assert guide.studio.done == 4 and len(page.ticks) == 5
    press(guide, 5, "again")
    assert "Nothing was chosen" in guide.refusals[5]
    page.places["extras"].children[0].value = True
    press(guide, 5, "again")
    guide.studio.known.panel.training.join()
    attend(guide)
    assert len(page.controls["kept"].options) == 2 and page.places["panel5"].children
    for step, name in ((5, "go_on"), (6, "test"), (7, "pack")):
        press(guide, step, name)
        assert not guide.refusals
    assert guide.service.address + "out/model.zip" in page.shown["found7"].value and (guide.service.place / "out/model.zip").is_file()


def test_what_nobody_foresaw_is_told_and_the_page_goes_on(guide: Guide) -> None:
    with patch.object(Studio, "choose_data", side_effect=ZeroDivisionError("<b>")):
        press(guide, 1, "look")
    assert "ZeroDivisionError" in guide.refusals[1] and "<b>" not in guide.page.shown["said1"].value
    guide.page.controls["source"].value = "folder"
    press(guide, 1, "look")
    assert guide.studio.done == 1 and not guide.refusals


def test_every_control_has_words_and_a_place(guide: Guide) -> None:
    page = guide.page
    assert all(c.description and (getattr(c, "tooltip", "") or c.description) for c in [*page.controls.values(), *page.buttons.values()])
    assert sorted(n for names in ORDER.values() for n in names) == sorted([*page.controls, "upload", "extras"])
    assert {n for _, n, *_ in PRESS} == set(page.buttons)


def test_headless_it_leaves_a_picture_and_hangs_nowhere(tmp_path: Path) -> None:
    cells = [new_code_cell("from adaptkit.widgets.guide import studio_page\nstudio_page()")]
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), tmp_path / "in.ipynb")
    nb = papermill.execute_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", cwd=tmp_path, progress_bar=False, execution_timeout=120)
    assert set(nb.cells[0].outputs[-1].data) == {"image/png", "text/plain", STATE}
    assert "Loading widget" not in (tmp_path / "out.ipynb").read_text()


def test_the_state_that_is_stored_names_no_folder_of_the_server(guide: Guide) -> None:
    stored = bundle(guide)[STATE]["state"]
    assert stored["done"] == 0 and guide.service.key not in json.dumps(stored)


# --- the server --------------------------------------------------------------------------------------


def test_terms_between_server_and_kernel(tmp_path: Path) -> None:
    assert arrive({}) == Service() and not list(arrivals(Service()))
    with pytest.raises(AdaptkitError, match="not what adaptkit studio writes"):
        arrive({SAID: "{"})
    agreed = Terms(str(tmp_path), "/studio/", limits=Limits(packed=100))
    one, two = (arrive({**agreed.to_environment(), "VOILA_KERNEL_ID": "k"}) for _ in range(2))
    assert one.key != two.key and one.place.parent == tmp_path and (one.place / "in").stat().st_mode & 0o077 == 0
    assert "at most 100 bytes" in refusal("a.zip", 101, Limits(packed=100)) and refusal("a.zip", 100, Limits(packed=100)) == ""


def test_a_visitor_is_a_browser_and_a_tab(tmp_path: Path) -> None:
    ann = begin_visit(tmp_path, "a secret", "tab-1")
    assert find_visit(tmp_path, "a secret", "tab-1") == ann and ann.place.stat().st_mode & 0o077 == 0
    for secret, tab in (("another", "tab-1"), ("a secret", "tab-2"), ("", "tab-1")):
        assert find_visit(tmp_path, secret, tab) is None
    agreed = Terms(str(tmp_path), "/studio/")
    service = arrive({**agreed.to_environment(), VISITOR: ann.place.name, "VOILA_KERNEL_ID": "k1"})
    assert service.place == ann.place and ann.kernel == "k1" and how_it_is(ann, kernel="k1", alive={"k1"}) == ""
    assert "has ended" in how_it_is(ann, kernel="k1", alive=set()) and "another place" in how_it_is(ann, kernel="k0", alive={"k1"})
    assert last_visit(tmp_path, "a secret", set()) is None
    (ann.work / NAME).write_text("{}")
    assert last_visit(tmp_path, "a secret", set()) == ann and last_visit(tmp_path, "a secret", {"k1"}) is None


def test_there_is_room_for_so_many(tmp_path: Path) -> None:
    one, two = (begin_visit(tmp_path, f"secret {i}", "a tab") for i in range(2))
    (one.place / "kernel").write_text("k1")
    known = {"alive": {"k1"}, "coming": {two.place.name}}
    assert not room(tmp_path, **known, most=2) and room(tmp_path, **known, most=3) and room(tmp_path, **known, most=2, key=one.place.name)
    with pytest.raises(AdaptkitError, match="visitors=0: it is a number of people"):
        Door(visitors=0)


def test_other_machines_need_a_token(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.7", "example.org"):
        with pytest.raises(AdaptkitError, match="can be reached from other machines"):
            Door(host=host, token="")
        with pytest.raises(AdaptkitError, match="can be guessed"):
            Door(host=host, token="short")
        assert len(Door(host=host).token or "") > 20
    assert Door(host="::1", token="").address == "http://[::1]:8866/" and Door(token="").address == "http://127.0.0.1:8866/"


def test_without_voila_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "voila", None)
    with pytest.raises(AdaptkitError, match=r"pip install 'adaptkit\[studio\]'"):
        serve(Door())


def test_the_command_line_refuses_in_a_sentence() -> None:
    for options, words in ((["--host", "0.0.0.0", "--no-token"], "leave the token on"), (["--data", "nowhere"], "There is no folder nowhere")):
        done = subprocess.run([sys.executable, "-c", "from adaptkit.cli import main; main()", "studio", *options], capture_output=True, text=True, env=os.environ)
        assert done.returncode == 1 and done.stderr.startswith("adaptkit: ") and words in done.stderr and "Traceback" not in done.stderr


def test_collect_without_a_panel_is_nothing_new(studio: Studio) -> None:
    assert collect(studio) is False
