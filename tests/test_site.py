"""The site: built from executed pages, whole, and with nothing loaded from elsewhere."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from adaptkit.core.registry import AdaptkitError
from adaptkit.notebooks.links import Seen, broken, outside
from adaptkit.notebooks.plugin import Runs
from adaptkit.notebooks.preparing import localised
from adaptkit.notebooks.site import complain, katex, settle
from adaptkit.notebooks.tree import pages, readme, sidebar

SETTINGS = """[DEFAULT]
repo = tiny
lib_name = adaptkit
lib_path = adaptkit
nbs_path = nbs
doc_path = _docs
version = 0.1
min_python = 3.11
license = apache2
title = tiny
description = tiny
branch = main
user = adaptkit
author = adaptkit
author_email = nobody@example.org
doc_host = https://adaptkit.github.io
doc_baseurl = /adaptkit
git_url = https://github.com/adaptkit/tiny
keywords = tiny
language = English
status = 3
audience = Developers
custom_sidebar = True
update_pyproject = False
"""


def write_page(path: Path, *sources: str) -> None:
    "A page whose sources are Markdown where they begin with #, > or a letter followed by words in brackets."
    made = [new_markdown_cell(s[3:]) if s.startswith("md:") else new_code_cell(s) for s in sources]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=made, metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}), path)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    "A project of two pages, with a formula on one of them if npm is there to bring KaTeX."
    (tmp_path / "settings.ini").write_text(SETTINGS)
    formula = "$x^2$ and " if shutil.which("npm") or (ROOT / ".cache").exists() else ""
    write_page(tmp_path / "nbs/index.ipynb", "md:# Tiny\n\n> A tiny site", f"md:{formula}[the other page](1_data/10_other.ipynb#a-sum)")
    write_page(tmp_path / "nbs/1_data/10_other.ipynb", "md:# Other", "md:## A sum\n\nUses `digest`. Go [home](../index.ipynb).", "6 * 7")
    config = (ROOT / "_quarto.yml").read_text().split("# pages:")[0].replace("href: seven_steps.ipynb", "href: 1_data/10_other.ipynb")
    lines = "\n".join("      " + line for line in sidebar(tmp_path / "nbs").split("\n"))
    (tmp_path / "_quarto.yml").write_text(f"{config.rstrip()}\n{lines}\nformat:\n  html:\n    theme:\n      light: cosmo\n      dark: darkly\n    toc: true\n")
    if (ROOT / ".cache").exists():
        shutil.copytree(ROOT / ".cache", tmp_path / ".cache")
    return tmp_path


def build(project: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    "Build the site of a project."
    command = [sys.executable, "-m", "adaptkit.notebooks.site", "build", *flags]
    return subprocess.run(command, cwd=project, capture_output=True, text=True)


def test_a_site_of_two_pages_is_whole(tiny: Path) -> None:
    done = build(tiny)
    assert done.returncode == 0, done.stdout + done.stderr
    site = tiny / "_proc/_docs"
    text = (site / "1_data/10_other.html").read_text()
    assert ">42<" in text.replace("\n", ""), "the result of the executed cell is shown"
    assert outside(site) == [] and broken(site) == []
    if "$x^2$" in (tiny / "nbs/index.ipynb").read_text():
        loads = Seen((site / "index.html").read_text()).loads
        assert "site_libs/katex/katex.min.js" in loads and (site / "site_libs/katex/katex.min.js").stat().st_size > 100_000
        assert list((site / "site_libs/katex/fonts").glob("*.woff2"))


def test_only_changed_pages_run_again(tiny: Path) -> None:
    assert "10_other.ipynb" in build(tiny).stdout
    assert "10_other.ipynb" not in build(tiny).stdout
    write_page(tiny / "nbs/1_data/10_other.ipynb", "md:# Other", "md:## A sum", "6 * 8")
    again = build(tiny)
    assert "10_other.ipynb" in again.stdout and "index.ipynb" not in again.stdout
    assert ">48<" in (tiny / "_proc/_docs/1_data/10_other.html").read_text().replace("\n", "")


def test_a_page_that_fails_stops_the_build(tiny: Path) -> None:
    write_page(tiny / "nbs/1_data/10_other.ipynb", "md:# Other", "md:## A sum", "1 / 0")
    done = build(tiny)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stdout and "A page has failed" in done.stderr
    assert not (tiny / "_proc/_docs/index.html").exists()


def test_a_broken_link_stops_the_build(tiny: Path) -> None:
    write_page(tiny / "nbs/index.ipynb", "md:# Tiny", "md:[nowhere](1_data/20_gone.ipynb)")
    done = build(tiny, "--stored")
    assert done.returncode == 1 and "20_gone" in done.stdout + done.stderr


def test_a_missing_anchor_stops_the_build(tiny: Path) -> None:
    write_page(tiny / "nbs/index.ipynb", "md:# Tiny", "md:[almost](1_data/10_other.ipynb#a-product)")
    done = build(tiny, "--stored")
    assert done.returncode == 1 and "a-product" in done.stdout + done.stderr


def test_something_from_elsewhere_stops_the_build(tiny: Path) -> None:
    write_page(tiny / "nbs/index.ipynb", "md:# Tiny", 'md:<img src="https://example.org/a.png">')
    done = build(tiny, "--stored")
    assert done.returncode == 1 and "loads from elsewhere: index.html: https://example.org/a.png" in done.stderr


@pytest.mark.parametrize(
    ("name", "text", "strangers"),
    [
        ("a.html", '<script src="//example.org/a.js"></script>', 1),
        ("a.html", '<link rel="stylesheet" href="https://example.org/a.css">', 1),
        ("a.html", '<iframe src="https://example.org"></iframe>', 1),
        ("a.html", "<script>import m from 'https://example.org/m.mjs'</script>", 1),
        ("a.html", "<style>body{background:url(https://example.org/a.png)}</style>", 1),
        ("a.css", '@import url("https://example.org/a.css");', 1),
        ("a.html", '<a href="https://example.org">go</a> <link rel="canonical" href="https://example.org">', 0),
        ("a.html", '<img src="data:image/png;base64,AAAA"><script src="lib/a.js"></script>', 0),
        ("a.html", "<p>from https://example.org we quote</p>", 0),
        ("a.css", 'a{background:url("data:image/svg+xml,%3csvg xmlns=\'http://www.w3.org/2000/svg\'/%3e")}', 0),
    ],
)
def test_what_counts_as_elsewhere(name: str, text: str, strangers: int, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert len(outside(tmp_path)) == strangers
    if strangers:
        with pytest.raises(AdaptkitError, match="loads from elsewhere"):
            complain(tmp_path, "https://own.org")


def test_what_counts_as_broken(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/index.html").write_text('<p id="here">')
    (tmp_path / "a b.html").write_text("")
    good = '<a href="sub/#here">1</a><a href="#me" id="me">2</a><a href="a%20b.html">3</a><a href="mailto:a@b.org">4</a><a href="/sub/index.html">5</a>'
    (tmp_path / "x.html").write_text(good)
    assert broken(tmp_path) == []
    (tmp_path / "x.html").write_text(good + '<a href="sub/#there">6</a><a href="gone.html">7</a>')
    assert broken(tmp_path) == ["x.html: gone.html", "x.html: sub/#there"]


def test_missing_npm_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AdaptkitError, match="install npm"):
        katex(tmp_path)


def test_fonts_stay_at_home(tmp_path: Path) -> None:
    (tmp_path / "a.css").write_text("@import url(https://fonts.googleapis.com/css2?family=A:wght@300;400&display=swap);b{c:d}")
    settle(tmp_path, tmp_path / ".cache")
    assert (tmp_path / "a.css").read_text() == "b{c:d}"


def test_links_become_local() -> None:
    names = {"core/files.html": "0_core/20_files.ipynb"}
    turn = {"names": names, "base": "https://a.org/kit"}
    assert localised("(https://a.org/kit/core/files.html#x)", "", **turn) == "(0_core/20_files.ipynb#x)"
    assert localised("(https://a.org/kit/core/files.html#x)", "1_data", **turn) == "(../0_core/20_files.ipynb#x)"
    assert localised("(https://a.org/kit/core/files.html#a.b).", "1_data", **turn) == "(../0_core/20_files.ipynb#a)."
    assert localised("(https://a.org/other/core/files.html)", "1_data", **turn) == "(https://a.org/other/core/files.html)"


def test_readme_hides_what_the_page_hides(tmp_path: Path) -> None:
    write_page(tmp_path / "index.ipynb", "md:# T", "#| hide\nsecret = 1", "#| echo: false\nsecret", "shown = 1", "md:![p](images/a.png) [b](/abs) [c](#d)")
    text = readme(tmp_path / "index.ipynb")
    assert "secret" not in text and "```python\nshown = 1\n```" in text
    assert "](nbs/images/a.png)" in text and "](/abs)" in text and "](#d)" in text


@pytest.mark.pages
@pytest.mark.alone
def test_the_whole_site_is_whole(executed: Runs, work: Path) -> None:
    rows = [executed.row(p.as_posix()) for p in pages(ROOT / "nbs")]
    assert not [str(r) for r in rows if r.status not in ("passed", "ungated")], "see test_pages"
    copies = executed.suite.out / "smoke"
    if (ROOT / ".cache").exists():
        shutil.copytree(ROOT / ".cache", work / ".cache", dirs_exist_ok=True)
    if not shutil.which("npm") and not (ROOT / ".cache").exists():
        pytest.skip("the formulas of the site need npm once, to fetch KaTeX")
    shutil.copytree(work / "nbs", copies, ignore=shutil.ignore_patterns("*.ipynb", "runs"), dirs_exist_ok=True)
    program = "from pathlib import Path; from adaptkit.notebooks import site; site.build(source=Path('runs/check/smoke'))"
    done = subprocess.run([sys.executable, "-c", program], cwd=work, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
