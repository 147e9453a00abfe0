"""Code blocks and commands in the documentation: what can be parsed, compiled, validated is."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import typer.main
import yaml

from pipeline.cli import GLOBAL_FLAGS, app
from pipeline.config import ALL_PRECISIONS, BackendName, Config, load_config
from tests.conftest import REPOSITORY
from tests.unit.docs.markdown import PAGES, Block, blocks, inline

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# A config that fragments complete, and that stands for a reader's own files.
MINE: dict[str, Any] = {
    "name": "mine",
    "network": {"factory": "models.unet:UNet", "weights": "checkpoint.pth"},
    "data": {
        "kind": "folder",
        "root": ".",
        "train": {"images": "train"},
        "validation": {"images": "val"},
        "classes": [{"name": "background", "colour": [0, 0, 0]}, {"name": "lesion", "colour": [220, 50, 47]}],
    },
    "preprocessing": {"height": 512, "width": 512},
}
# Commands on a model file need these besides.
BESIDES = {
    "clean": ["output"],
    "calibrate": ["images", "output"],
    "engine": ["precision", "output"],
    "validate": ["engine", "images"],
}
SHELL = {".", "[", "cat", "cd", "export", "fi", "mkdir", "sha256sum", "unzip", "$triton/bin/tritonserver"}
# What may stand before a command.
BEFORE = re.compile(r"\w+=.*|if|then")
MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
EXTRAS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
ROOT = typer.main.get_command(app)


@pytest.fixture(autouse=True)
def data_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every variable that a path in a config or a page names."""
    texts = [path.read_text(encoding="utf-8") for path in (*PAGES, *(REPOSITORY / "configs").glob("*.yaml"))]
    for name in set(re.findall(r"\$\{(\w+)\}", "\n".join(texts))) - set(os.environ):
        monkeypatch.setenv(name, "/data")


# ---------------------------------------------------------------------- commands


def command_lines(script: str) -> Iterator[list[str]]:
    """The words of every command of a script, without variables and keywords before it."""
    for line in re.sub(r"\\\n", " ", script).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";|&"):
                while command and BEFORE.fullmatch(command[0]):
                    command.pop(0)
                if command:
                    yield command
                command = []
            else:
                command.append(word)


def check_script(script: str, page: Path, folder: Path) -> None:
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for program, *arguments in command_lines(script):
        if program in SHELL:
            continue
        if program.endswith("unet-trt"):
            check_unet_trt(arguments, folder)
        elif program == "make":
            check_make(arguments)
        elif program == "pip":
            named = [extra for word in arguments for extra in re.findall(r"[\w-]+", word.partition("[")[2])]
            assert set(named) <= set(EXTRAS), arguments
        elif arguments[:2] == ["-m", "pipeline"]:
            check_unet_trt(arguments[2:], folder)
        else:
            assert program.startswith(("python", ".venv/bin/python")), f"no such command: {program}"
            known = (REPOSITORY / arguments[0]).is_file() or f"`{arguments[0]}`" in page.read_text(encoding="utf-8")
            assert known, f"no such script: {arguments[0]}"


def parsed(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The command's name and what the program itself makes of the rest."""
    command, context, rest = ROOT, None, [word for word in arguments if word not in GLOBAL_FLAGS]
    name = "unet-trt"
    while hasattr(command, "commands"):
        context = command.make_context(name, rest, parent=context)
        name, *rest = [*context._protected_args, *context.args]
        assert name in command.commands, f"no such command: {name}"
        command = command.commands[name]
    return name, command.make_context(name, rest, parent=context).params


def check_unet_trt(arguments: Sequence[str], folder: Path) -> None:
    name, given = parsed(arguments)
    assert set(given.get("precision") or ()) <= set(ALL_PRECISIONS)
    assert given.get("backend") in (None, *get_args(BackendName))
    if "config" not in given or name == "convert":
        return
    config, overrides = given["config"], given.get("overrides") or []
    if given.get("model"):
        assert config is None, "a model file and a config"
        assert all(given[key] for key in BESIDES[name]), f"{name} on a file needs {BESIDES[name]}"
        return
    assert config is not None, "neither a model file nor a config"
    known = REPOSITORY / config
    if not known.is_file():
        assert known.name in ("mine.yaml", "config.yaml"), f"no such config: {config}"
        known = folder / "mine.yaml"
        known.write_text(yaml.safe_dump(MINE))
    load_config(known, overrides)


def check_make(arguments: Sequence[str]) -> None:
    for word in arguments:
        name, assigned, _ = word.partition("=")
        pattern = rf"\b{name}\b" if assigned else rf"^{name}:"
        assert re.search(pattern, MAKEFILE, re.M), f"no such target or variable: {word}"


@pytest.mark.parametrize("block", blocks("bash"), ids=str)
def test_bash(block: Block, tmp_path: Path) -> None:
    check_script(block.text, block.page, tmp_path)


@pytest.mark.parametrize("block", [block for block in blocks("") if "$ " in block.text], ids=str)
def test_commands_above_their_output(block: Block, tmp_path: Path) -> None:
    check_script("\n".join(re.findall(r"^\$ (.*)", block.text, re.M)), block.page, tmp_path)


def test_commands_in_sentences() -> None:
    """Options of `unet-trt …` in running text exist; arguments may be left out there."""
    wrong = []
    for page in PAGES:
        for token in inline(page, "code_inline"):
            program, *words = token.content.split()
            if program != "unet-trt" or not words:
                continue
            command = ROOT
            while hasattr(command, "commands") and words and words[0] in command.commands:
                command = command.commands[words.pop(0)]
            known = {name for one in command.params for name in (*one.opts, *one.secondary_opts)}
            found = [word for word in words if word.startswith("-")]
            unknown = hasattr(command, "commands") and words[:1] not in ([], ["…"])
            if unknown or not set(found) <= known:
                wrong.append(f"{page.name}: {token.content}")
    assert wrong == []


# ---------------------------------------------------------------------- other languages


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python(block: Block) -> None:
    tree = ast.parse(block.text)
    compile(tree, str(block), "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "pipeline":
            module = importlib.import_module(str(node.module))
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml(block: Block, tmp_path: Path) -> None:
    stated = yaml.safe_load(block.text)
    keys = {field.alias or name for name, field in Config.model_fields.items()}
    if set(stated) <= keys:
        whole = {"name", "network", "data", "preprocessing"} <= set(stated)
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(stated if whole else completed(stated)))
        load_config(file)
        return
    scripts = list(ci_scripts(stated))
    assert scripts, "neither a config nor a pipeline of GitHub or GitLab"
    for script in scripts:
        check_script(script, block.page, tmp_path)


def completed(fragment: dict[str, Any]) -> dict[str, Any]:
    """MINE with the fragment's sections; a network is replaced, since its sources exclude one another."""
    merged = dict(MINE)
    for key, value in fragment.items():
        merge = isinstance(value, dict) and key != "network"
        merged[key] = {**MINE.get(key, {}), **value} if merge else value
    return merged


def ci_scripts(stated: dict[Any, Any]) -> Iterator[str]:
    for job in stated.get("jobs", stated).values():
        if isinstance(job, dict):
            yield from (step["run"] for step in job.get("steps", ()) if "run" in step)
            yield from job.get("script", ())


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_json(block: Block) -> None:
    json.loads(block.text)


def test_every_block_says_its_language() -> None:
    """Or none: what a program prints, and drawings of folders."""
    assert {block.language for block in blocks()} <= {"bash", "python", "yaml", "json", "text", ""}
    unsaid = [str(block) for block in blocks("") if re.search(r"^(unet-trt|make|pip) ", block.text, re.M)]
    assert unsaid == []
