"""The house: who may know what, and how large a room may be. `make layers` checks the rest."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE, PASSES = ROOT / "kasmina_fx", ROOT / "passes"
LONGEST, MOST = 300, 20


def sources() -> list[Path]:
    own = [p for p in PACKAGE.rglob("*.py") if PACKAGE / "passes" not in p.parents]
    return sorted([*own, *PASSES.rglob("*.py")])


def everything() -> list[Path]:
    folders = [ROOT / name for name in ("tests", "examples", "benchmarks")]
    return [*sources(), *(p for folder in folders for p in folder.rglob("*.py"))]


def test_at_most_twenty_files_lie_directly_in_the_package() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= MOST


def test_no_source_file_is_longer_than_three_hundred_lines() -> None:
    lengths = {p.relative_to(ROOT).as_posix(): len(p.read_text().splitlines()) for p in sources()}
    assert {name: n for name, n in lengths.items() if n > LONGEST} == {}


def private_names(path: Path) -> Iterator[str]:
    """Names of torch with a leading underscore that a file imports or reads."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from (part for part in parts if part.startswith("_"))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("torch"):
                    yield from (part for part in alias.name.split(".") if part.startswith("_"))
        elif isinstance(node, ast.Attribute) and re.fullmatch(
            r"torch\.(?!ops\.)[\w.]*", ast.unparse(node)
        ):
            yield from (part for part in ast.unparse(node).split(".") if re.match(r"_[^_]", part))


def test_private_names_of_torch_are_known_below_one_folder_alone() -> None:
    found = {
        p.relative_to(ROOT).as_posix(): sorted(set(private_names(p)))
        for p in sources()
        if PACKAGE / "_torch" not in p.parents
    }
    assert {name: names for name, names in found.items() if names} == {}


@pytest.mark.parametrize("path", ["seeds/definition.py", "reference.py"])
def test_the_judge_imports_nothing_of_what_it_judges(path: str) -> None:
    imported = {
        node.module
        for node in ast.walk(ast.parse((PACKAGE / path).read_text()))
        if isinstance(node, ast.ImportFrom)
    }
    assert not {m for m in imported if m and m.startswith("kasmina_fx.physical")}
    assert not {m for m in imported if m and m.startswith("kasmina_fx.passes")}


def test_no_first_line_of_a_docstring_is_a_question() -> None:
    found = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                first = (ast.get_docstring(node) or "").partition("\n")[0]
                if "?" in first:
                    found.append(f"{path.relative_to(ROOT)}: {first}")
    assert found == []


def test_lines_of_documents_are_short() -> None:
    documents = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"]
    long = {
        f"{path.name}:{number}": len(line)
        for path in documents
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 120 and not line.startswith("|")
    }
    assert long == {}


def test_every_folder_of_the_package_has_tests() -> None:
    wings = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    rooms = {p.name for p in (ROOT / "tests").iterdir() if p.is_dir()}
    assert wings - rooms == {"_torch"}  # tested through what uses them
