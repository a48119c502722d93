"""The rules of the house as functions: each takes the root of a project and lists what breaks the rule there."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import yaml

from adaptkit.notebooks.tree import pages, readme, sidebar

IMPORTS = (ast.Import, ast.ImportFrom)


def cells(root: Path) -> Iterator[tuple[str, int, dict]]:
    "All cells of all pages, with the page's path and the cell's number."
    for page in pages(root / "nbs"):
        for n, cell in enumerate(json.loads((root / "nbs" / page).read_text())["cells"]):
            yield f"nbs/{page.as_posix()}", n, {**cell, "source": "".join(cell["source"])}


def code(root: Path) -> Iterator[tuple[str, int, str, list[ast.stmt]]]:
    "All code cells: page, number, source, statements."
    for page, n, cell in cells(root):
        if cell["cell_type"] == "code" and not re.search(r"^\s*[%!]", cell["source"], re.M):
            yield page, n, cell["source"], ast.parse(cell["source"]).body


def exports(source: str) -> bool:
    "Whether a cell is exported."
    return bool(re.search(r"^#\| *export", source, re.M))


def modules(root: Path) -> list[Path]:
    "All modules of the package that are not mere markers."
    return [p for p in sorted((root / "adaptkit").rglob("*.py")) if p.name != "_modidx.py" and p.read_text().strip()]


def orphans(root: Path) -> list[str]:
    "Modules whose page is gone, or exports something else by now."
    found = []
    for module in modules(root):
        head = re.search(r"File to edit: (\S+\.ipynb)", module.read_text())
        page = (module.parent / head[1]) if head else None
        name = ".".join(module.relative_to(root / "adaptkit").with_suffix("").parts)
        if page is None or not page.exists():
            found.append(f"{module.relative_to(root)}: no page")
        elif not re.search(rf"#\| *default_exp {re.escape(name)}\b", "".join(page.read_text().split("\\n"))):
            found.append(f"{module.relative_to(root)}: its page exports another module")
    return found


def mixed_imports(root: Path) -> list[str]:
    "Cells of source pages that import and do something else as well."
    sources = {page for page, _, source, _ in code(root) if "default_exp" in source}
    found = []
    for page, n, _, body in code(root):
        plain = [isinstance(s, IMPORTS) or (isinstance(s, ast.If) and all(isinstance(t, IMPORTS) for t in s.body)) for s in body]
        if page in sources and any(isinstance(s, IMPORTS) for s in body) and not all(plain):
            found.append(f"{page}, cell {n}: imports stand alone in their cells")
    return found


def bound(body: list[ast.stmt]) -> Iterator[str]:
    "Names that a cell defines at its top level."
    for s in body:
        if isinstance(s, ast.FunctionDef | ast.ClassDef):
            yield s.name
        for target in getattr(s, "targets", [getattr(s, "target", None)]) if isinstance(s, ast.Assign | ast.AnnAssign) else []:
            yield from (t.id for t in ast.walk(target) if isinstance(t, ast.Name))


def redefined(root: Path) -> list[str]:
    "Exported names that are defined a second time on their page: asserts behind that would test the wrong object."
    found, first = [], {}
    for page, n, source, body in code(root):
        for name in bound(body):
            if (page, name) in first:
                found.append(f"{page}, cell {n}: {name} is defined again")
            elif exports(source):
                first[page, name] = n
    return found


def long_cells(root: Path) -> list[str]:
    "Code cells with more than 40 lines of code; one that is a single class may have 80, as classes may."
    found = []
    for page, n, source, body in code(root):
        size = length(source.split("\n"), 1, source.count("\n") + 1)
        if size > (80 if len(body) == 1 and isinstance(body[0], ast.ClassDef) else 40):
            found.append(f"{page}, cell {n}: {size} lines")
    return found


def stored_outputs(root: Path) -> list[str]:
    "Cells that carry results into the repository, unless their page is marked `keep_output` (it needs a GPU)."
    kept = {
        f"nbs/{p.as_posix()}"
        for p in pages(root / "nbs")
        if json.loads((root / "nbs" / p).read_text())["metadata"].get("keep_output")
    }
    return [
        f"{page}, cell {n}: stored output"
        for page, n, cell in cells(root)
        if page not in kept and (cell.get("outputs") or cell.get("execution_count"))
    ]


def star_imports(root: Path) -> list[str]:
    "Star imports: they blind every checker."
    found = [(f"{page}, cell {n}", body) for page, n, _, body in code(root)]
    found += [(str(p.relative_to(root)), ast.parse(p.read_text()).body) for d in ("adaptkit", "tests") for p in (root / d).rglob("*.py")]
    return [
        f"{where}: import *"
        for where, body in found
        for node in ast.walk(ast.Module(body, []))
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
    ]


def length(lines: list[str], start: int, end: int) -> int:
    "Lines of code from `start` to `end` (from 1): blank lines and comments are free."
    return sum(1 for line in lines[start - 1 : end] if line.strip() and not line.strip().startswith("#"))


def too_big(root: Path) -> list[str]:
    "Function bodies over 25 lines, classes over 80, modules over 250."
    found = []
    for module in modules(root):
        text = module.read_text()
        lines, where = text.split("\n"), module.relative_to(root)
        if (size := length(lines, 1, len(lines))) > 250:
            found.append(f"{where}: {size} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and (size := length(lines, node.lineno, node.end_lineno)) > 80:
                found.append(f"{where}: class {node.name} has {size} lines")
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
                if (size := length(lines, body[0].lineno, node.end_lineno)) > 25:
                    found.append(f"{where}: the body of {node.name} has {size} lines")
    return found


def untyped(root: Path) -> list[str]:
    "Arguments and results without a type; public functions without a docstring of one line."
    found = []
    for module in modules(root):
        for node in ast.walk(ast.parse(module.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            a = node.args
            args = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
            bare = [x.arg for x in args if x.annotation is None and x.arg not in ("self", "cls")]
            where = f"{module.relative_to(root)}: {node.name}"
            found += [f"{where}({x}) has no type" for x in bare]
            found += [f"{where} has no result type"] if node.returns is None else []
    return found


def undocumented(root: Path) -> list[str]:
    "Public functions and classes at the top of a module without a docstring of one line."
    return [
        f"{module.relative_to(root)}: {node.name} needs a docstring of one line"
        for module in modules(root)
        for node in ast.parse(module.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        if (ast.get_docstring(node) or "\n").count("\n")
    ]


def annotations(node: ast.FunctionDef) -> Iterator[str]:
    "Names in the annotations of a function."
    for part in ast.walk(node):
        for note in (getattr(part, "annotation", None), getattr(part, "returns", None)):
            yield from (n.id for n in ast.walk(note) if isinstance(n, ast.Name)) if note else ()


def forward_names(root: Path) -> list[str]:
    "Exported functions with an annotation that names a class of a later cell of the page: nbdev cannot document them."
    seen: dict[str, dict[str, int]] = {}
    exported = [(page, n, body) for page, n, source, body in code(root) if exports(source)]
    for page, n, body in exported:
        seen.setdefault(page, {}).update({node.name: n for node in body if isinstance(node, ast.ClassDef)})
    return [
        f"{page}[{n}]: {node.name} names {name}, which stands in cell {seen[page][name]}"
        for page, n, body in exported
        for node in body
        if isinstance(node, ast.FunctionDef)
        for name in annotations(node)
        if seen[page].get(name, 0) > n
    ]


def leaks(root: Path) -> list[str]:
    "Tracked lines with a folder that only one machine has, or the host of a registry."
    folders = "|".join(("wo" + "rk/[a-z.]", "ro" + "ot/", "ho" + "me/[a-z]", "tm" + "p/[a-z]"))
    hosts = "|".join(map(re.escape, ("files.python" + "hosted", "py" + "pi.org/simple", "registry.npm" + "js", "deb.deb" + "ian")))
    leak = re.compile(rf"(?<![\w.])/(?:{folders})|{hosts}")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True)
    names = listed.stdout.split("\0") if listed.returncode == 0 else [str(p.relative_to(root)) for p in root.rglob("*")]
    found = []
    for name in filter(None, names):
        try:
            lines = (root / name).read_text().splitlines()
        except (UnicodeDecodeError, OSError):
            continue
        found += [f"{name}:{n}: {line.strip()[:100]}" for n, line in enumerate(lines, 1) if leak.search(line)]
    return found


def navigation(root: Path) -> list[str]:
    "Pages that the site doesn't list, listed pages that don't exist."
    config = yaml.safe_load((root / "_quarto.yml").read_text())["website"]
    found = [] if config["sidebar"]["contents"] == yaml.safe_load(sidebar(root / "nbs")) else ["_quarto.yml: the sidebar is not current: make export"]
    links = [i["href"] for side in ("left", "right") for i in config["navbar"].get(side, []) if "://" not in i["href"]]
    return found + [f"_quarto.yml: the navbar links {href}, which does not exist" for href in links if not (root / "nbs" / href).exists()]


def stale_readme(root: Path) -> list[str]:
    "A README that is not the home page."
    current = (root / "README.md").read_text() == readme(root / "nbs/index.ipynb")
    return [] if current else ["README.md is not current: make export"]


RULES = (orphans, mixed_imports, redefined, forward_names, long_cells, stored_outputs, star_imports, too_big, untyped, undocumented, leaks, navigation, stale_readme)
