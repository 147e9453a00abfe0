"""What the documentation says of the program is what the program has."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from pipeline.graph.cleaning import clean_passes
from tests.conftest import REPOSITORY
from tests.unit.docs.markdown import DOCS

PACKAGE = REPOSITORY / "pipeline"
SVG = "{http://www.w3.org/2000/svg}"


# ---------------------------------------------------------------------- reference


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["config.md", "commands.md", "python.md"])
def test_the_reference_is_what_its_sources_say(generator: ModuleType, page: str) -> None:
    committed = (DOCS / "reference" / page).read_text(encoding="utf-8")
    assert committed == generator.pages()[page], "run `make docs` and commit docs/reference"


def test_the_reference_has_no_other_page(generator: ModuleType) -> None:
    assert {path.name for path in (DOCS / "reference").iterdir()} == set(generator.pages())


# ---------------------------------------------------------------------- messages


def words_of_the_program() -> str:
    """Every string in the sources; where a value is put in, a line ends."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found += [part.value if isinstance(part, ast.Constant) else "\n" for part in node.values]
                found.append("\n")
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found += [node.value.replace("%s", "\n"), "\n"]
    return "".join(map(str, found))


def quoted_messages() -> list[str]:
    """The codes in the first column of the tables of messages."""
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    cells = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
    return [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]


def test_every_quoted_message_is_the_programs() -> None:
    said = words_of_the_program()
    parts = {part.strip() for message in quoted_messages() for part in message.split("…")}
    assert len(parts) > 60
    assert sorted(part for part in parts if part not in said) == []


# ---------------------------------------------------------------------- pictures


def texts(picture: str, kind: str) -> list[list[str]]:
    """What stands in each group of a picture, or in the whole where there are none."""
    root = ElementTree.parse(DOCS / "images" / picture).getroot()
    groups = root.findall(f"{SVG}g[@class='layer']") or [root]
    return [[str(text.text) for text in group.iter(f"{SVG}text") if text.get("class") == kind] for group in groups]


def test_the_picture_of_the_flow_has_real_stages() -> None:
    (stages,) = texts("flow.svg", "stage")
    assert stages
    assert [stage for stage in stages if not (PACKAGE / "stages" / f"{stage}.py").is_file()] == []


def layers() -> dict[str, int]:
    """The rank of every module and folder of pipeline/ in the picture of the house; the lowest layer is 0."""
    lines = texts("house.svg", "modules")[::-1]
    return {name.rstrip("/"): rank for rank, names in enumerate(lines) for name in " · ".join(names).split(" · ")}


def imports(path: Path) -> Iterator[str]:
    """Modules and folders of pipeline/ that a module imports, but for type checkers alone."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("pipeline."))
        waiting += ast.iter_child_nodes(node)


def test_the_picture_of_the_house_names_every_module() -> None:
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path.is_dir() and path.name[0] != ".")}
    assert set(layers()) == there - {"__init__", "__pycache__"}


def test_modules_import_from_their_own_layer_and_lower_ones() -> None:
    rank = layers()
    upward = []
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name != "__init__":
            found = [other for other in imports(path) if rank.get(other, 0) > rank[name]]
            upward += [f"{path.relative_to(PACKAGE)} imports {other}" for other in found]
    assert upward == []


# ---------------------------------------------------------------------- tables


def test_the_table_of_passes_is_theirs_in_order() -> None:
    section = (DOCS / "cleaning.md").read_text(encoding="utf-8").partition("## The passes, in order")[2]
    rows = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`([\w-]+)`", row.split(" | ")[0])]
    assert named == [each.name for each in clean_passes()]
