"""Parameters: what annotations mean, what fits, and that values arrive as they were sent."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from enum import Enum, IntEnum
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest.mock import patch

import comm
import nbformat
import papermill
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from adaptkit.core.registry import AdaptkitError
from adaptkit.notebooks.annotations import Names, Range, worded
from adaptkit.notebooks.client import Client
from adaptkit.notebooks.forms import as_text, control, form, help_text, table
from adaptkit.notebooks.parameters import checked, declared, from_text, inject, plain, read_page, tagged, written
from adaptkit.notebooks.values import as_json, fit
from adaptkit.widgets.still import STATE, VIEW

ROOT = Path(__file__).parents[1]
SPEC = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
ABOVE = """import pathlib
import typing as t
from enum import Enum, IntEnum, StrEnum, auto
from pathlib import Path
from typing import Annotated, Any, Literal, Optional
from adaptkit.notebooks.parameters import Range

class Mode(Enum):
    FAST = 1
    SLOW = "all"
    OTHER = "FAST"

class Level(IntEnum):
    QUIET = 0
    LOUD = 2

class Taste(StrEnum):
    SWEET = auto()
    SALTY = "salt"

class Mixed(str, Enum):
    ONE = "one"
"""


def page(folder: Path, lines: str, *below: str, above: str = ABOVE, name: str = "page.ipynb") -> Path:
    "A page that declares `lines`."
    cells = [new_code_cell(source) for source in (above, lines, *below)]
    cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(new_notebook(cells=cells, metadata=SPEC), folder / name)
    return folder / name


def one(folder: Path, line: str) -> Any:
    "The single parameter that `line` declares."
    (found,) = declared(page(folder, line)).values()
    return found


def parameterised(made: Path, values: dict[str, Any]) -> Any:
    "The notebook as our engine gets it from papermill."
    nb = load_notebook_node(str(made))
    nb.metadata.papermill["input_path"] = str(made)
    return parameterize_notebook(nb, values)


DEFAULTS = "data = 'elpv'\nepochs: int = 2\nrate = 1e-3\nfast = False\nshares = [0.5, 0.5]\nlimit = None\nsplit = (0.8, 0.2)"


@pytest.fixture
def typed(tmp_path: Path) -> Path:
    return page(tmp_path, DEFAULTS)


# What a page declares


def test_declared_parameters_keep_order_type_and_note(tmp_path: Path) -> None:
    found = declared(page(tmp_path, DEFAULTS + "  # train and test"))
    assert {name: p.default for name, p in found.items()} == {
        "data": "elpv", "epochs": 2, "rate": 1e-3, "fast": False, "shares": [0.5, 0.5], "limit": None, "split": (0.8, 0.2),
    }  # fmt: skip
    assert [*found][0] == "data" and found["split"].note == "train and test" and found["data"].note == ""
    assert [p.type for p in found.values()] == [str, int, float, bool, list, Any, tuple]
    assert repr(found["epochs"]) == "Parameter(name='epochs', default=2, annotation='int', note='')"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("x: Annotated[int, Range(1, 100)] = 2", "a whole number from 1 to 100"),
        ("x: t.Annotated[float, Range(low=0)] = 0", "a number of at least 0"),
        ("x: Annotated[float | None, Range(high=-1.5)] = None", "a number or None of at most -1.5"),
        ("x: Annotated[int, Range(1, 9)] | None = None", "a whole number from 1 to 9 or None"),
        ("x: Literal['a', 1, None] = 'a'", "'a', 1 or None"),
        ("x: Optional[str] = None", "text or None"),
        ("x: int | float | None = 1.5", "a whole number, a number or None"),
        ("x: 't.Union[int, list[int]]' = [1]", "a whole number or a list, each item a whole number"),
        ("x: tuple[int, str] = (1, 'a')", "a tuple of 2: a whole number, then text"),
        ("x: tuple[()] = ()", "an empty tuple"),
        ("x: tuple[tuple[float, ...], ...] = ((1, 2.0), ())", "a tuple, each item a tuple, each item a number"),
        ("x: t.Dict[str, t.List[bool]] = {'a': [True]}", "a dictionary, each value a list, each item True or False"),
        ("x: pathlib.Path = pathlib.Path('a')", "a path"),
        ("x = Path('a', 'b')", "a path"),
        ("x: Mode = Mode.FAST", "FAST, SLOW or OTHER"),
        ("x = Level.LOUD", "QUIET or LOUD"),
        ("x: Taste | None = Taste.SALTY", "SWEET or SALTY or None"),
        ("x: Mixed = Mixed.ONE", "ONE"),
        ("x: Any = {'a': float('nan')}", "anything"),
        ("x = None", "anything"),
        ("x: list[Annotated[int, Range(0)]] = []", "a list, each item a whole number of at least 0"),
    ],
)
def test_annotations_in_words(line: str, words: str, tmp_path: Path) -> None:
    assert one(tmp_path, line).words == words


def test_a_type_may_have_a_name(tmp_path: Path) -> None:
    above = "from typing import Annotated\nfrom adaptkit.notebooks.parameters import Range\nRate = Annotated[float, Range(0, 1)]\nLoop = Loop | None"
    cells = [new_code_cell(above), new_code_cell("rate: Rate = 0.1\nother: 'Rate | None' = None", metadata={"tags": ["parameters"]})]
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}), tmp_path / "named.ipynb")
    assert [p.words for p in declared(tmp_path / "named.ipynb").values()] == ["a number from 0 to 1", "a number from 0 to 1 or None"]
    assert "rate" in papermill.inspect_notebook(str(tmp_path / "named.ipynb")), "papermill knows it, too"
    cells[1].source = "rate: Loop = 1"
    nbformat.write(new_notebook(cells=cells), tmp_path / "loop.ipynb")
    with pytest.raises(AdaptkitError, match="Loop cannot be the type"):
        declared(tmp_path / "loop.ipynb")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("epochs = 2 * 3", r"page.ipynb: .*line 1 does not: epochs = 2 \* 3"),
        ("import os", "line 1 does not: import os"),
        ("a, b = 1, 2", "line 1 does not"),
        ("a: int", "line 1 does not"),
        ("x = {1, 2}", "line 1 does not"),
        ("x = open('a')", "line 1 does not"),
        ("x = b'a'", "line 1 does not"),
        ("x = 1\nx = 2", "'x' is declared twice"),
        ("x = (", "no Python"),
        ("list = [1]", "'list' would hide Python's own list"),
        ("x: Annotated[int, Range(1, 100)] = 0", "declared as a whole number from 1 to 100; its default 0"),
        ("x: tuple[float, ...] = [0.5]", "its default \\[0.5\\] is something else"),
        ("x: list[tuple[int, ...]] = [[1]]", "is something else"),
        ("x: Path = 'a'", "declared as a path; its default 'a'"),
        ("x: Mode = 'FAST'", "declared as FAST, SLOW or OTHER"),
        ("x: Mode = Mode.FASTER", "Mode has no member FASTER"),
        ("x: int = True", "is something else"),
        ("x: set[int] = 1", "set\\[int\\] cannot be the type"),
        ("x: bytes = 1", "bytes cannot be the type"),
        ("x: np.ndarray = 1", "cannot be the type"),
        ("x: 1 = 1", "cannot be the type"),
        ("x: Annotated[int, 3] = 1", "cannot be the type"),
        ("x: Literal[1.5] = 1.5", "cannot be the type"),
        ("x: Literal[Mode.FAST] = 1", "page.ipynb"),
        ("x: Annotated[str, Range(1, 2)] = 'a'", "belongs to a number, not to text"),
        ("x: Annotated[int, Range(2, 1)] = 1", "is no range"),
        ("x: Annotated[int, Range()] = 1", "is no range"),
        ("x: Annotated[int, Range('a', 'b')] = 1", "is no range"),
        ("x: Annotated[int, Range(1, 2, 3)] = 1", "page.ipynb"),
        ("x: Annotated[int, Range(a, b)] = 1", "page.ipynb"),
        ("x: str | Path = 'a'", "a file cannot tell"),
        ("x: str | None | Mode = None", "a file cannot tell"),
        ("x: list[int] | tuple[int, ...] = [1]", "a file cannot tell"),
        ("x: Level | int = 1", "a file cannot tell"),
        ("x: dict[int, str] = {}", "keys of a dictionary have to be text"),
        ("x: list[1] = []", "cannot be the type"),
        ("x: 'int[' = 1", "line 1|no Python"),
    ],
)
def test_slips_of_authors_are_named(line: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(AdaptkitError, match=words):
        declared(page(tmp_path, line))


def test_names_have_to_be_known_above(tmp_path: Path) -> None:
    with pytest.raises(AdaptkitError, match="import what is not built in above"):
        declared(page(tmp_path, "x: Path | None = None", above="import os"))
    late = page(tmp_path, "x: Path | None = None", "from pathlib import Path", above="%matplotlib inline\n!ls\nthis is no Python")
    with pytest.raises(AdaptkitError, match="Path \\| None|Path cannot"):
        declared(late)
    assert Names.of(["%%bash\nimport os", "%time x = 1\nimport os as o"]).known == {"o": "os"}


def test_enumerations_are_imported_where_the_page_imports_them(tmp_path: Path) -> None:
    made = page(tmp_path, "x: S = S.SIGINT\ny: signal.Signals = signal.Signals.SIGINT", above="import signal\nfrom signal import Signals as S")
    found = declared(made)
    assert found["x"].default.name == "SIGINT" and found["x"].names != found["y"].names
    nb = parameterised(made, {"x": "SIGTERM", "y": 15})
    inject(nb)
    assert nb.cells[2].source == "# Parameters\nx = S.SIGTERM\ny = signal.Signals.SIGTERM\n"
    with pytest.raises(AdaptkitError, match="cannot be imported here"):
        declared(page(tmp_path, "x: Missing = Missing.A", above="from not_installed_anywhere import Missing"))
    with pytest.raises(AdaptkitError, match="cannot be the type"):
        declared(page(tmp_path, "x: Flag = None", above="from re import RegexFlag as Flag"))


def test_nothing_of_the_page_is_run(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    made = page(tmp_path, "x: Mode = Mode.A", above=f"import pathlib\nfrom enum import Enum\npathlib.Path({str(touched)!r}).touch()\nclass Mode(Enum):\n    A = 1\n    open({str(touched)!r}, 'w')")
    assert declared(made)["x"].default.name == "A" and not touched.exists()


@pytest.mark.parametrize(
    ("body", "words"),
    [("A = 2 * 3 * len('a')", "members of Mode have to be plain"), ("A = open('x')", "members of Mode have to be plain"), ("pass", "cannot be the type")],
)
def test_enumerations_that_cannot_be_read_are_named(body: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(AdaptkitError, match=words):
        declared(page(tmp_path, "x: Mode | None = None", above=f"import enum\nclass Mode(enum.Enum):\n    'Nothing.'\n    _hidden_ = 3\n    {body}"))


def test_two_parameter_cells_or_none_are_refused(tmp_path: Path) -> None:
    made = page(tmp_path, "a = 1", "b = 1")
    nb = read_page(made)
    nb.cells[2].metadata["tags"] = ["parameters"]
    nbformat.write(nb, made)
    with pytest.raises(AdaptkitError, match="2 cells tagged"):
        declared(made)
    for cell in nb.cells:
        cell.metadata["tags"] = []
    nbformat.write(nb, made)
    with pytest.raises(AdaptkitError, match="no cell of it is tagged"):
        declared(made)


OURS = [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if tagged(read_page(p), "parameters")]


def test_some_of_our_pages_take_parameters() -> None:
    assert {"seven_steps", "texts", "cifar10"} <= {p.stem for p in OURS}


@pytest.mark.parametrize("made", OURS, ids=lambda p: p.stem)
def test_every_page_of_ours_declares_well(made: Path) -> None:
    found = declared(made)
    values = {name: p.default for name, p in found.items()}
    assert all(p.note and p.annotation for p in found.values())
    assert checked(made, values) == values == from_text(made, [(n, str(v)) for n, v in values.items()])


# What fits


@pytest.mark.parametrize(
    ("line", "given", "wanted"),
    [
        ("x: float = 0.5", 1, 1.0),
        ("x: float = 0.5", "nan", math.nan),
        ("x: tuple[float, ...] = ()", [1, 2.5], (1.0, 2.5)),
        ("x: tuple[int, tuple[str, ...]] = (1, ())", [3, ["a"]], (3, ("a",))),
        ("x: list[int] = []", (1, 2), [1, 2]),
        ("x: Path = Path('a')", "b/c", Path("b/c")),
        ("x: str = 'a'", Path("a/b"), "a/b"),
        ("x: Path | None = None", None, None),
        ("x: dict[str, tuple[int, ...]] = {}", {"a": [1]}, {"a": (1,)}),
        ("x: Literal[1, True] = 1", True, True),
        ("x: int | float = 1", 3, 3),
        ("x: int | float = 1", 3.0, 3.0),
        ("x = None", (1, Path("a")), [1, "a"]),
        ("x = [1]", ["a"], ["a"]),
        ("x: Annotated[float, Range(0, 1)] | None = None", 1, 1.0),
    ],
)
def test_values_that_fit(line: str, given: Any, wanted: Any, tmp_path: Path) -> None:
    found = checked(page(tmp_path, line), {"x": given})["x"]
    assert repr(found) == repr(wanted)


@pytest.mark.parametrize(
    ("line", "given", "words"),
    [
        ("x: int = 2", True, "True; .*page.ipynb wants a whole number, such as 2\\."),
        ("x: int = 2", "3", "'3'; .* wants a whole number"),
        ("x: int = 2", 2.0, "wants a whole number"),
        ("x: int = 2", None, "wants a whole number"),
        ("x: float = 2", False, "wants a number"),
        ("x: float = 2", "2", "wants a number"),
        ("x: float = 2", 10**400, "wants a number"),
        ("x: bool = True", 1, "wants True or False"),
        ("x: str = 'a'", 1, "wants text, such as 'a'"),
        ("x: str = 'a'", "\ud800", "wants text"),
        ("x = (1, 2)", "half", "wants a tuple"),
        ("x: Annotated[int, Range(1, 100)] = 2", 0, "0; .* wants a whole number from 1 to 100, such as 2"),
        ("x: Annotated[float, Range(0)] = 2", math.nan, "wants a number of at least 0"),
        ("x: Literal[1] = 1", True, "wants 1"),
        ("x: Literal[1] = 1", 1.0, "wants 1"),
        ("x: Literal['a'] = 'a'", "b", "wants 'a'"),
        ("x: Mode = Mode.FAST", "fast", "wants FAST, SLOW or OTHER, such as Mode.FAST"),
        ("x: tuple[int, int] = (1, 2)", (1,), "wants a tuple of 2"),
        ("x: tuple[int, ...] = (1, 2)", [1, 2, "c"], "with 'c' at \\[2\\]"),
        ("x: dict[str, list[int]] = {}", {"a": [1, None]}, "with None at \\['a'\\]\\[1\\]"),
        ("x: dict[str, int] = {}", {1: 1}, "wants a dictionary"),
        ("x: list[float] = []", {1.0}, "wants a list"),
        ("x = None", object, "wants anything"),
        ("x: list[int] | None = None", [*range(1000), "a"], "…, with 'a' at \\[1000\\]; .* or None"),
    ],
)
def test_values_that_do_not_fit(line: str, given: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(AdaptkitError, match="^Parameter 'x' is .*?" + words):
        checked(page(tmp_path, line), {"x": given})


def test_a_number_too_long_to_print_is_refused(typed: Path) -> None:
    with pytest.raises(AdaptkitError, match="'epochs' is too long a number .*wants a whole number, such as 2"):
        checked(typed, {"epochs": 10**5000})


def test_unknown_names_get_the_nearest(typed: Path) -> None:
    for ask in (lambda: checked(typed, {"epoch": 1}), lambda: from_text(typed, [("epoch", "1")]), lambda: inject(parameterised(typed, {"epoch": 1}))):
        with pytest.raises(AdaptkitError, match="Did you mean 'epochs'"):
            ask()


def test_members_are_known_by_themselves_by_name_and_by_value(tmp_path: Path) -> None:
    made = page(tmp_path, "x: Mode = Mode.FAST")
    fast = declared(made)["x"].default
    kind = type(fast)
    for value, member in ((fast, fast), ("FAST", fast), (1, fast), ("all", kind.SLOW), ("OTHER", kind.OTHER)):
        assert checked(made, {"x": value})["x"] is member
    Own = Enum("Mode", {"FAST": 1})
    assert checked(made, {"x": Own["FAST"]})["x"] is fast
    with pytest.raises(AdaptkitError):
        checked(made, {"x": True})


@pytest.mark.parametrize(
    ("line", "text", "value"),
    [
        ("x = 'elpv'", "007", "007"),
        ("x: int = 2", "3", 3),
        ("x: int = 2", " 3", 3),
        ("x = 1e-3", "1", 1.0),
        ("x = 1e-3", "-inf", -math.inf),
        ("x = False", "True", True),
        ("x = [0.5]", "(1, 2)", [1, 2]),
        ("x = (0.5,)", "[1, 2]", (1, 2)),
        ("x: tuple[float, ...] = ()", "1, 2", (1.0, 2.0)),
        ("x = None", "x", "x"),
        ("x = None", "None", None),
        ("x: str | None = None", "None", None),
        ("x: str | None = None", "3", "3"),
        ("x: str | None = None", "'a'", "'a'"),
        ("x: Path | None = None", "''", Path("''")),
        ("x = None", "'3'", "3"),
        ("x: int | str = 1", "3", 3),
        ("x: Path = Path('a')", "007", Path("007")),
        ("x: Path = Path('a')", "7", Path("7")),
        ("x: Literal['1', 'b'] = 'b'", "1", "1"),
        ("x: dict[str, float] = {}", "{'a': 1}", {"a": 1.0}),
    ],
)
def test_text_becomes_what_the_page_declares(line: str, text: str, value: object, tmp_path: Path) -> None:
    found = from_text(page(tmp_path, line), [("x", "0"), ("x", text)])["x"]
    assert repr(found) == repr(value)


def test_text_that_does_not_fit_is_shown_as_it_was_understood(tmp_path: Path) -> None:
    made = page(tmp_path, "x: Annotated[int, Range(1, 9)] = 2")
    for text, shown in (("many", "'many'"), ("10", "10"), ("{[]: 1}", "'{"), ("(" * 5000, "'\\(")):
        with pytest.raises(AdaptkitError, match=f"is {shown}"):
            from_text(made, [("x", text)])


# The round trip

finite = st.integers(-(10**30), 10**30)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
numbers = st.floats(allow_nan=True, allow_infinity=True)
paths = texts.filter(lambda text: "\0" not in text).map(Path)
MODES = ("Mode.FAST", "Mode.SLOW", "Mode.OTHER")
LEAVES: list[tuple[str, st.SearchStrategy[str]]] = [  # annotation, and Python for its values
    ("int", finite.map(repr)),
    ("float", numbers.map(written)),
    ("bool", st.booleans().map(repr)),
    ("str", texts.map(repr)),
    ("Path", paths.map(written)),
    ("pathlib.Path", paths.map(lambda path: f"pathlib.{written(path)}")),
    ("None", st.just("None")),
    ("Mode", st.sampled_from(MODES)),
    ("Level", st.sampled_from(["Level.QUIET", "Level.LOUD"])),
    ("Taste", st.sampled_from(["Taste.SWEET", "Taste.SALTY"])),
    ("Literal['a', 1, True, None, -3]", st.sampled_from(["'a'", "1", "True", "None", "-3"])),
    ("Annotated[int, Range(-3, 1_000_000_000)]", st.integers(-3, 10**9).map(repr)),
    ("Annotated[float, Range(0)]", st.floats(0, allow_nan=False).map(written)),
    ("int | float | None", st.one_of(finite.map(repr), numbers.map(written), st.just("None"))),
    ("Optional[Path]", st.one_of(paths.map(written), st.just("None"))),
]
Kind = tuple[str, st.SearchStrategy[str]]


def listed(kind: Kind) -> Kind:
    return f"list[{kind[0]}]", st.lists(kind[1], max_size=3).map(lambda items: f"[{', '.join(items)}]")


def tupled(kind: Kind) -> Kind:
    return f"tuple[{kind[0]}, ...]", st.lists(kind[1], max_size=3).map(lambda items: f"({''.join(f'{item}, ' for item in items)})")


def fixed(kinds: list[Kind]) -> Kind:
    inner = ", ".join(kind[0] for kind in kinds) or "()"
    return f"tuple[{inner}]", st.tuples(*(kind[1] for kind in kinds)).map(lambda items: f"({''.join(f'{item}, ' for item in items)})")


def keyed(kind: Kind) -> Kind:
    return f"dict[str, {kind[0]}]", st.dictionaries(texts, kind[1], max_size=3).map(lambda d: f"{{{', '.join(f'{k!r}: {v}' for k, v in d.items())}}}")


kinds = st.recursive(
    st.sampled_from(LEAVES),
    lambda inner: st.one_of(inner.map(listed), inner.map(tupled), inner.map(keyed), st.lists(inner, max_size=3).map(fixed)),
    max_leaves=6,
)


@st.composite
def declarations(draw: st.DrawFn) -> list[tuple[str, str, str]]:
    "Up to six parameters: annotation (or none), default and another value, as Python."
    found = []
    for _ in range(draw(st.integers(1, 6))):
        annotation, values = draw(kinds)
        found.append((annotation, draw(values), draw(values)))
    return found


def space() -> dict[str, Any]:
    "A page's namespace, behind the cells above its parameters."
    names: dict[str, Any] = {}
    exec(ABOVE, names)
    return names


def same(one: Any, other: Any) -> bool:
    "Equal, of the same type, inside as well; nan is equal to nan, 0.0 not to -0.0."
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return [*one] == [*other] and all(same(one[key], other[key]) for key in one)
    return repr(one) == repr(other)


def test_same_is_strict() -> None:
    assert same((1, {"a": [math.nan]}), (1, {"a": [math.nan]}))
    assert not any(same(*pair) for pair in ((1, 1.0), (True, 1), ((1,), [1]), (0.0, -0.0), ([1], [1, 2]), ({"a": 1}, {"b": 1})))


def arrive(made: Path, values: dict[str, Any], names: dict[str, Any]) -> dict[str, Any]:
    "What a page with `names` holds once papermill has given it `values`, and the engine has seen them."
    nb = parameterised(made, values)
    inject(nb)
    assert json.loads(json.dumps(nb.metadata.papermill.parameters, allow_nan=False)) == plain(checked(made, values))
    arrived = dict(names)
    for cell in nb.cells[1:3]:
        exec(cell.source, arrived)
    return arrived


@settings(max_examples=200, deadline=None)
@given(declarations())
def test_values_arrive_equal_and_of_the_same_type(tmp_path_factory: pytest.TempPathFactory, declaration: list[tuple[str, str, str]]) -> None:
    names = space()
    lines = "\n".join(f"p{i}: {annotation} = {default}" for i, (annotation, default, _) in enumerate(declaration))
    made = page(tmp_path_factory.getbasetemp(), lines)
    sent = {f"p{i}": eval(value, names) for i, (_, _, value) in enumerate(declaration)}
    filed = json.loads(json.dumps(plain(sent), allow_nan=False))
    for given_as in (sent, filed, checked(made, sent)):
        arrived = arrive(made, given_as, names)
        assert all(same(arrived[name], value) for name, value in sent.items())


plain_values = st.recursive(
    st.none() | st.booleans() | finite | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(plain_values, st.lists(plain_values, max_size=3), st.dictionaries(texts, plain_values, max_size=3))
def test_undeclared_kinds_arrive_as_a_file_holds_them(tmp_path_factory: pytest.TempPathFactory, x: Any, y: list[Any], z: dict[str, Any]) -> None:
    made = page(tmp_path_factory.getbasetemp(), "x = None\ny = [1]\nz = {'a': 1}\nw = (1, 'a')\nv = Path('a')\nu = Mode.FAST")
    names = space()
    sent = {"x": x, "y": y, "z": z, "w": tuple(y), "v": Path("b"), "u": names["Mode"].OTHER}
    arrived = arrive(made, sent, names)
    assert all(same(arrived[name], value) for name, value in sent.items())


MANY = """count: int = 1
big: int = 0
rate: float = 0.5
zero: float = 0.5
nothing: float = 0.5
worst: Annotated[float, Range(high=0)] = -0.5
on: bool = False
word: str = "a"
data: Path | None = None
folder: Path = Path(".")
mode: Mode = Mode.FAST
level: Level = Level.QUIET
size: Literal["small", 3, None] = "small"
shares: tuple[float, ...] = (0.5, 0.5)
nested: tuple[tuple[int, Path], ...] = ()
empty: tuple[()] = ()
table: dict[str, list[tuple[Mode, float]]] = {}
free = None
pair = (1, 2)"""
SENT = {
    "count": "7", "big": "10**30", "rate": "1e-300", "zero": "-0.0", "nothing": "float('nan')", "worst": "float('-inf')", "on": "True",
    "word": "'Größe \\'\\n\\\\ 火 😀 {x}'", "data": "Path('a b') / 'ü'", "folder": "Path('/')", "mode": "Mode.OTHER", "level": "Level.LOUD", "size": "3",
    "shares": "()", "nested": "((1, Path('a')), (-2, Path('b')))", "empty": "()", "table": "{'a \"b\"': [(Mode.SLOW, float('inf'))], '': []}",
    "free": "{'deep': [None, {'x': [1.0]}]}", "pair": "('x', [1])",
}  # fmt: skip


def refuse(text: str) -> None:
    "Python reads NaN and Infinity in JSON, browsers don't."
    raise AssertionError(f"{text} is no JSON")


def test_many_values_arrive_in_a_real_kernel(tmp_path: Path) -> None:
    made = page(tmp_path, MANY, "[repr(v) for v in (" + ", ".join(SENT) + ")]")
    names = space()
    sent = {name: eval(source, names) for name, source in SENT.items()}
    quiet = {"progress_bar": False, "extra_arguments": ["--log-level=ERROR"]}
    done = papermill.execute_notebook(made, tmp_path / "done.ipynb", sent, engine_name="adaptkit", **quiet)
    assert eval(done.cells[-1].outputs[0].data["text/plain"]) == [repr(value) for value in sent.values()]
    kept = json.loads((tmp_path / "done.ipynb").read_text(), parse_constant=refuse)
    assert kept["metadata"]["papermill"]["parameters"] == plain(sent)
    nbformat.validate(read_page(tmp_path / "done.ipynb"))


def test_what_does_not_fit_starts_no_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Client, "execute", lambda *_, **__: pytest.fail("a kernel was started"))
    made = page(tmp_path, "epochs: Annotated[int, Range(1, 9)] = 2")
    with pytest.raises(AdaptkitError, match="'epochs' is 10; .*page.ipynb wants a whole number from 1 to 9, such as 2"):
        papermill.execute_notebook(made, tmp_path / "done.ipynb", {"epochs": 10}, engine_name="adaptkit", progress_bar=False)


def test_an_executed_copy_can_be_run_again(typed: Path, tmp_path: Path) -> None:
    nb = parameterised(typed, {"epochs": 5, "split": (0.5, 0.5), "rate": math.inf})
    inject(nb)
    first = nb.cells[2].source
    nbformat.write(nb, tmp_path / "again.ipynb")
    again = load_notebook_node(str(tmp_path / "again.ipynb"))
    inject(again)
    assert sorted(again.cells[2].source.split("\n")) == sorted(first.split("\n"))  # nbformat sorts the names in the file
    assert first == "# Parameters\nepochs = 5\nsplit = (0.5, 0.5)\nrate = float('inf')\n"
    more = parameterize_notebook(again, {"epochs": 6})
    inject(more)
    assert more.cells[2].source == "# Parameters\nepochs = 6\n" and len(more.cells) == 3


# What the engine sees


def test_papermills_guesses_are_read_by_the_declaration(tmp_path: Path) -> None:
    made = page(tmp_path, "split: tuple[float, ...] = (0.8, 0.2)\ndata: Path = Path('a')\nmode: Mode = Mode.FAST\nn: int | None = 3\nfree = None\nrate = 0.5")
    nb = parameterised(made, {"split": "(0.5, 0.5)", "data": "x", "mode": "SLOW", "n": "None", "free": "(1, 2)", "rate": "nan"})
    inject(nb)
    assert nb.cells[2].source.splitlines()[1:] == [
        "split = (0.5, 0.5)", "data = Path('x')", "mode = Mode.SLOW", "n = None", "free = '(1, 2)'", "rate = float('nan')",
    ]  # fmt: skip
    assert nb.metadata.papermill.parameters == {"split": [0.5, 0.5], "data": "x", "mode": "SLOW", "n": None, "free": "(1, 2)", "rate": "nan"}


def test_a_number_is_not_made_a_text_again(typed: Path) -> None:
    with pytest.raises(AdaptkitError, match="'data' is 7; .* wants text, such as 'elpv'. With papermill's command, -r"):
        inject(parameterised(typed, {"data": 7}))
    with pytest.raises(AdaptkitError, match="'epochs' is 'many'; .* wants a whole number"):
        inject(parameterised(typed, {"epochs": "many"}))


def test_a_refused_value_changes_nothing(typed: Path) -> None:
    nb = parameterised(typed, {"epochs": 3, "fast": 1})
    before = nbformat.writes(nb)
    with pytest.raises(AdaptkitError, match="'fast' is 1"):
        inject(nb)
    assert nbformat.writes(nb) == before


def test_without_values_a_page_runs_as_it_is(tmp_path: Path) -> None:
    for made in (page(tmp_path, "import os\nx = os.sep"), page(tmp_path, "epochs = 2")):
        nb = load_notebook_node(str(made))
        before = nbformat.writes(nb)
        inject(nb)
        assert nbformat.writes(nb) == before


def test_the_injected_cell_stands_right_behind_the_tagged_one(typed: Path) -> None:
    nb = parameterised(typed, {"epochs": 3})
    nb.cells.insert(2, new_markdown_cell("between"))
    with pytest.raises(AdaptkitError, match="right behind"):
        inject(nb)
    first = parameterised(typed, {"epochs": 3})
    first.cells.insert(0, first.cells.pop(2))
    with pytest.raises(AdaptkitError, match="right behind"):
        inject(first)
    twice = parameterised(typed, {"epochs": 3})
    twice.cells.insert(2, twice.cells[2].copy())
    with pytest.raises(AdaptkitError, match="2 cells tagged `injected"):
        inject(twice)


def test_values_for_a_page_without_the_tag_or_with_two_are_refused(typed: Path) -> None:
    nb = parameterised(typed, {"epochs": 3})
    nb.cells[1].metadata["tags"] = []
    with pytest.raises(AdaptkitError, match="no cell of it is tagged"):
        inject(nb)
    two = load_notebook_node(str(typed))
    two.cells[0].metadata["tags"] = ["parameters"]
    with pytest.raises(AdaptkitError, match="2 cells tagged `parameters`"):
        inject(two)
    with pytest.raises(AdaptkitError, match="page.ipynb"):
        two.metadata.papermill["input_path"] = str(typed)
        inject(two)


def test_a_parameter_that_shadows_a_builtin_is_refused_before_the_start(tmp_path: Path) -> None:
    with pytest.raises(AdaptkitError, match="hide Python's own list"):
        inject(parameterised(page(tmp_path, "list = [1]"), {"list": [2]}))


def test_papermills_own_names_and_other_languages_are_left_alone(typed: Path) -> None:
    nb = parameterised(typed, {"PAPERMILL_INPUT_PATH": "a.ipynb", "epochs": 1})
    inject(nb)
    assert "PAPERMILL_INPUT_PATH = 'a.ipynb'" in nb.cells[2].source
    other = parameterised(typed, {"anything": 1})
    other.metadata.kernelspec["language"] = "R"
    inject(other)
    assert other.cells[2].source == "# Parameters\nanything = 1\n"


# Pieces


def test_range_is_for_everybodys_models() -> None:
    from pydantic import BaseModel, ValidationError

    class Model(BaseModel):
        share: Annotated[float, Range(0, 1)]

    assert Model(share=0.5).share == 0.5
    with pytest.raises(ValidationError, match="not a number from 0 to 1"):
        Model(share=1.5)
    assert str(Range(high=3)) == "of at most 3" and repr(Range(0)) == "Range(low=0, high=None)"
    with pytest.raises(AdaptkitError, match="is no range"):
        Range(0, math.inf)


def test_what_no_file_keeps_is_refused() -> None:
    for value in ({1, 2}, b"a", object(), [1j], lambda: 1):
        with pytest.raises(AdaptkitError, match="no file could keep"):
            as_json(value)
        with pytest.raises(AdaptkitError, match="no file could keep"):
            written(value)
    with pytest.raises(AdaptkitError, match="no file could keep"):
        as_json({1: 2})


def test_members_with_odd_names_can_be_written() -> None:
    Odd = Enum("Odd", {"two words": 1, "class": 2})
    assert [written(member) for member in Odd] == ["Odd['two words']", "Odd['class']"]
    assert written(Odd["class"], {Odd: "o.Odd"}) == "o.Odd['class']" and as_json(IntEnum("I", "A B")(2)) == "B"


def test_fit_asks_for_the_right_type() -> None:
    assert fit({"a": [1]}, dict[str, tuple[float, ...]]) == {"a": (1.0,)} and worded(Literal["a", "b"]) == "'a' or 'b'"


def test_reading_parameters_loads_nothing_heavy() -> None:
    program = "import sys, adaptkit.notebooks.parameters as p; print([m for m in ('pydantic', 'papermill', 'nbformat', 'torch', 'IPython') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


# Forms

FORM = """epochs: Annotated[int, Range(1, 100)] = 2  # passes over the | training data
seed: Annotated[int, Range(0, 1000000)] = 0
huge: Annotated[int, Range(0, 100000000000000000000)] = 3
share: Annotated[float, Range(0, 1)] = 0.5
floor: Annotated[int, Range(0)] = 3
fast: bool = False
size: Literal["small", 3, None] = "small"
mode: Mode = Mode.FAST
level: Level = Level.QUIET
rate: float = float("inf")
word: str = "<b>a</b>"
data: Path | None = None
shares: tuple[float, ...] = (0.8, 0.2)
nested: tuple[tuple[Mode, Path], ...] = ((Mode.SLOW, Path("a")),)
free = None"""


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    return page(tmp_path, FORM)


def test_the_form_has_the_control_that_suits_the_type(wide: Path) -> None:
    kinds = {name: type(widget).__name__ for name, widget in form(wide).controls.items()}
    assert [*kinds] == [*declared(wide)]
    texts = {name for name, kind in kinds.items() if kind == "Text"}
    assert texts == {"huge", "floor", "rate", "word", "data", "shares", "nested", "free"}
    assert {kinds["epochs"], kinds["seed"], kinds["share"], kinds["fast"]} == {"IntSlider", "BoundedIntText", "FloatSlider", "Checkbox"}
    assert {kinds["size"], kinds["mode"], kinds["level"]} == {"Dropdown"}


def test_an_untouched_form_gives_the_defaults(wide: Path) -> None:
    assert all(same(value, declared(wide)[name].default) for name, value in form(wide).values().items())


def test_a_filled_form_gives_typed_values_or_refuses(wide: Path) -> None:
    filled = form(wide)
    new = {"epochs": 30, "share": 0.123456789, "size": 3, "mode": declared(wide)["mode"].default.__class__.SLOW, "word": "None", "data": "7", "shares": "[1]", "nested": "()"}
    for name, value in new.items():
        filled.controls[name].value = value
    found = filled.values()
    assert found["epochs"] == 30 and found["share"] == 0.123456789 and found["size"] == 3 and found["mode"].name == "SLOW"
    assert [found[n] for n in ("word", "data", "shares", "nested")] == ["None", Path("7"), (1.0,), ()]
    filled.controls["floor"].value = "-1"
    with pytest.raises(AdaptkitError, match="'floor' is -1; .* wants a whole number of at least 0"):
        filled.values()


def shown_by(front: str, filled: Any, *moves: tuple[str, Any]) -> list[dict[str, Any]]:
    "What a form displays, and displays again when it is filled in, to somebody with a browser (`lab`) or without (`none`)."
    InteractiveShell.instance()
    try:
        with patch.dict("os.environ", {"ADAPTKIT_WIDGETS": front}), patch("comm.create_comm", comm.DummyComm), capture_output() as shown:
            filled._ipython_display_()
            for name, value in moves:
                filled.controls[name].value = value
    finally:
        InteractiveShell.clear_instance()
    return [o.data for o in shown.outputs]


def test_a_form_without_a_browser_is_a_table(wide: Path) -> None:
    (alone,) = shown_by("none", form(wide))
    assert VIEW not in alone and "&lt;b&gt;" in alone["text/html"] and "<b>" not in alone["text/html"] and "Literal" not in alone["text/plain"]
    assert repr(form(wide)).startswith("Form(page=") and len(form(wide).widget.children) == len(declared(wide))


def test_a_form_leaves_a_table_of_what_was_filled_in(wide: Path) -> None:
    live, behind, *later = shown_by("lab", form(wide), ("epochs", 30), ("data", "cells & more"))
    assert VIEW in live and "model not found" not in behind["text/html"] and len(later) == 2
    last = later[-1]
    assert "<td>30</td>" in last["text/html"] and "cells &amp; more" in last["text/html"] and "filled in" in last["text/plain"]
    kept = last[STATE]["state"]
    assert (kept["epochs"], kept["data"]) == (30, "cells & more") and [*kept] == [*declared(wide)]


def test_the_table_says_the_same_in_every_form(wide: Path) -> None:
    shown = table(wide)
    lines = shown._repr_markdown_().splitlines()
    assert len(lines) == len(shown.rows) + 2 and "passes over the \\| training data" in lines[2]
    for name, words, default, note in shown.rows:
        assert name in str(shown) and words in str(shown) and default in str(shown) and note in str(shown)
    assert repr(shown).startswith("Table(epochs, seed") and shown.rows[-2][2] == "[['SLOW', 'a']]" and shown.rows[-3][2] == "(0.8, 0.2)"


def test_help_can_be_copied_into_a_shell(wide: Path) -> None:
    told = help_text(wide, width=70)
    assert max(map(len, told.splitlines())) <= 70 and "a whole number from 1 to 100" in told
    words = [shlex.split(line) for line in told.splitlines() if line.startswith("  -p ")]
    assert all(same(from_text(wide, [(name, text)])[name], declared(wide)[name].default) for _, name, text in words)
    assert [word[1] for word in words] == [*declared(wide)]


@settings(max_examples=100, deadline=None)
@given(declarations())
def test_what_is_shown_can_be_typed(tmp_path_factory: pytest.TempPathFactory, declaration: list[tuple[str, str, str]]) -> None:
    lines = "\n".join(f"p{i}: {annotation} = {default}" for i, (annotation, default, _) in enumerate(declaration))
    made = page(tmp_path_factory.getbasetemp(), lines)
    for name, one in declared(made).items():
        assert control(one) is not None
        assert same(from_text(made, [(name, as_text(one.default))])[name], fit(one.default, one.type))
