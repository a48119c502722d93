"""Registries and plugins, pictures: what every other part stands on"""

from __future__ import annotations

import io
import os
import shutil
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure as PlainFigure
from PIL import Image

from adaptkit.core import registry
from adaptkit.core.figures import Figure, png_of, rendered, whole
from adaptkit.core.registry import Registry

def install(folder: Path, name: str, target: str) -> None:
    "What pip leaves behind."
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[adaptkit.tone]\n{name} = {target}\n")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "A folder in which Python looks for packages."
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "place")])
    return tmp_path / "place"


def test_plugins_are_seen_when_they_come_and_forgotten_when_they_go(place: Path) -> None:
    tones: Registry[float] = Registry("tone")
    assert list(tones) == []  # the folder isn't there yet
    install(place, "circle", "math:pi")
    assert list(tones) == ["circle"] and not tones.items
    install(place, "growth", "math:e")
    assert list(tones) == ["circle", "growth"] and "growth" in tones
    shutil.rmtree(place)
    assert list(tones) == [] and "circle" not in tones


def test_the_current_folder_counts_where_python_looks_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "here", "circle", "math:pi")
    (tmp_path / "there").mkdir()
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    tones: Registry[float] = Registry("tone")
    for folder, found in (("there", []), ("here", ["circle"]), ("there", [])):
        monkeypatch.chdir(tmp_path / folder)
        assert list(tones) == found


def test_entry_points_are_read_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(place, "circle", "math:pi")
    real, calls = metadata.entry_points, []
    monkeypatch.setattr(metadata, "entry_points", lambda: calls.append(1) or real())
    registry.declared_at.cache_clear()
    tones: Registry[float] = Registry("tone")
    assert [list(tones) for _ in range(3)] == [["circle"]] * 3 and "nothing" not in tones and len(calls) == 1


def opened(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png)).convert("RGB")


def saved(figure: PlainFigure, **how: object) -> Image.Image:
    "The picture of matplotlib's own savefig."
    file = io.BytesIO()
    figure.savefig(file, facecolor="white", **how)
    return opened(file.getvalue())


def curve(**how: object) -> Figure:
    figure = Figure(figsize=(3, 2), layout="constrained", **how)
    figure.subplots().plot([1, 3, 2])
    return figure


@pytest.mark.parametrize("dpi", [72, 100, 150])
def test_drawn_once_is_what_savefig_draws(dpi: int) -> None:
    figure = curve(dpi=150, facecolor="red")
    png = png_of(rendered(figure, dpi=dpi), dpi=dpi)
    assert np.array_equal(np.array(opened(png)), np.array(saved(figure, dpi=dpi)))
    assert abs(Image.open(io.BytesIO(png)).info["dpi"][0] - dpi) < 0.1


def test_a_figure_looks_afterwards_as_before() -> None:
    figure = curve(dpi=150, facecolor="red")
    before = figure.canvas, figure.get_facecolor(), figure.dpi, saved(figure).size
    figure._repr_png_()
    assert (figure.canvas, figure.get_facecolor(), figure.dpi, saved(figure).size) == before == (*before[:3], (450, 300))
    figure.axes[0].draw = None  # type: ignore[method-assign]  # can't be called
    with pytest.raises(TypeError):
        figure._repr_png_()
    assert (figure.canvas, figure.get_facecolor(), figure.dpi) == before[:3]


def test_a_frameless_figure_is_on_white() -> None:
    figure = curve(frameon=False)
    figure.suptitle("smooth letters")
    greys = len(np.unique(np.array(rendered(figure).convert("L"))))
    assert greys > 50


LONG = "a sentence that is wider than the picture, " * 3


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f.axes[0].set_title(LONG),
        lambda f: f.axes[0].set_xlabel(LONG),
        lambda f: f.suptitle(LONG),
        lambda f: f.supxlabel(LONG),
        lambda f: f.text(0.9, 0.5, LONG),
        lambda f: f.axes[0].text(1, 2, LONG),
        lambda f: f.add_axes((0, 0, 1, 0.5)).set_xlabel("below the edge"),
        lambda f: f.set_layout_engine("none"),
    ],
)
def test_what_layout_has_no_room_for_is_there_all_the_same(change) -> None:
    figure = curve()
    assert whole(figure) is not None
    change(figure)
    shown, trimmed = opened(figure._repr_png_()), saved(figure, dpi=100, bbox_inches="tight")
    assert np.array_equal(np.array(shown), np.array(trimmed))


def test_long_titles_in_parts_of_a_figure_are_there() -> None:
    figure = Figure(figsize=(4, 2), layout="constrained")
    for part in figure.subfigures(1, 2):
        part.subplots().plot([1, 2])
        part.suptitle(LONG)
    assert whole(figure) is None and opened(figure._repr_png_()).width > 450


def test_empty_margins_go() -> None:
    figure = Figure(figsize=(6, 3), layout="constrained")
    ax = figure.subplots()
    ax.imshow(np.eye(4))
    ax.set_axis_off()
    width, height = opened(figure._repr_png_()).size
    assert 300 < height <= 320 and abs(width - height) < 20
    assert whole(figure, margin=40).size == (width + 60, height + 60)
    empty = Figure(figsize=(2, 1), layout="constrained")
    assert whole(empty) is None and opened(empty._repr_png_()).size == saved(empty, dpi=100, bbox_inches="tight").size


def test_the_current_working_folder_may_be_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    os.rmdir(gone)
    assert registry.changed_at(str(tmp_path / "never"))[1] == registry.changed_at("")[1] == 0
