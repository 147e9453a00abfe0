"""Writes docs/reference: the configuration from its models, the commands from the program, Python from the docstrings.

``make docs`` runs it; ``pages`` is what a test compares the committed files with.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer.main
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import pipeline.errors
from pipeline import config
from pipeline.cli import app

REPOSITORY = Path(__file__).resolve().parent.parent
REFERENCE = REPOSITORY / "docs" / "reference"
NOTE = "<!-- Written by docs/generate.py: change the source it reads, then run `make docs`. -->"
BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
WORDS = {bool: "yes or no", int: "integer", float: "number", str: "text", Path: "path", Any: "any value"}
PLURALS = {"integer": "integers", "number": "numbers", "text": "texts", "path": "paths", "a mapping": "mappings"}
PARAGRAPH = "\n\n"
SECTIONS = ("Args", "Attributes", "Returns", "Raises")
# Classes beside the errors by heading, as (module, name, file).
PUBLIC = {
    "Predicting": [
        *(("pipeline", name, "pipeline/predictor.py") for name in pipeline.__all__[::-1]),
        ("pipeline.backends.gpu_array", "GpuArray", "pipeline/backends/gpu_array.py"),
    ],
    "Networks": [
        ("models.unet", "UNet", "models/unet.py"),
        ("models.fcn8s", "FCN8s", "models/fcn8s.py"),
        ("models.detector", "Detector", "models/detector.py"),
    ],
}


def pages() -> dict[str, str]:
    """The text of every generated page by its file name."""
    return {"config.md": config_page(), "commands.md": commands_page(), "python.md": python_page()}


# ---------------------------------------------------------------------- configuration


def config_page() -> str:
    intro = f"""\
{NOTE}
# Configuration

One YAML file says everything about a network and its data. [Your own network](../own-network.md) and
[your own data](../own-data.md) explain how to write one; [configs](../../configs/cells.yaml) has examples.
Unknown keys and wrong values are errors. `--set section.key=value` overrides a key.

{doc(config).partition(PARAGRAPH)[2]}
"""
    places: dict[type[BaseModel], list[str]] = {}
    for path, model in nested(config.Config):
        places.setdefault(model, []).append(f"`{path}`")
    sections = [section(model, ", ".join(paths)) for model, paths in places.items()]
    return "\n".join([intro, section(config.Config, "The file"), *sections, budgets()])


def nested(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every model below a model with its dotted path."""
    for name, field in model.model_fields.items():
        inner = model_of(field.annotation)
        if inner is not None:
            origin = get_origin(field.annotation)
            where = f"{path}{field.alias or name}{'[]' if origin is tuple else '.*' if origin is dict else ''}"
            yield where, inner
            yield from nested(inner, f"{where}.")


def model_of(annotation: Any) -> type[BaseModel] | None:
    """The model in an annotation such as ``tuple[Model, ...]`` or ``Model | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (model_of(argument) for argument in get_args(annotation))
    return next((model for model in found if model is not None), None)


def section(model: type[BaseModel], title: str) -> str:
    rows = []
    for name, field in model.model_fields.items():
        key = field.alias or name
        inner = model_of(field.annotation)
        text = field.description or (first_line(inner) if inner else None)
        if text is None:
            raise SystemExit(f"{model.__name__}.{name} has no description, which the reference would show")
        rows.append((f"`{key}`", words(field), default(field), text))
    return "\n".join([f"## {title}", "", doc(model), "", table(("key", "value", "default", "what"), rows)])


def words(field: FieldInfo) -> str:
    """What a value of a field may be."""
    limits = [
        f"{sign} {value:,}" if isinstance(value, int) else f"{sign} {value:g}"
        for item in field.metadata
        for name, sign in BOUNDS.items()
        if (value := getattr(item, name, None)) is not None
    ]
    return " ".join([kind(field.annotation), ", ".join(limits)]).strip()


def kind(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in WORDS:
        return WORDS[annotation]
    if model_of(annotation) is annotation:
        return "a mapping"
    if origin is Literal:
        return " · ".join(f"`{value}`" for value in arguments)
    if origin is Annotated:
        return kind(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(kind(each) for each in arguments if each is not NoneType)
    if origin is dict:
        return f"{several(arguments[1])} by {kind(arguments[0])}"
    if origin is list:
        return kind(arguments[0])  # of a parameter that may be given again
    if origin is tuple:
        return (
            f"list of {several(arguments[0])}" if arguments[-1] is ... else f"{len(arguments)} {several(arguments[0])}"
        )
    raise SystemExit(f"no words for the type {annotation}")


def several(annotation: Any) -> str:
    one = kind(annotation)
    return PLURALS.get(one, one)


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "**needed**"
    value = field.default
    if value is None or value in ((), {}) or isinstance(value, BaseModel):
        return ""
    return f"`{yaml(value)}`"


def yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(yaml, value))}]"
    return "1/255" if value == 1 / 255 else f"{value:g}" if isinstance(value, float) else str(value)


def budgets() -> str:
    """The defaults of ``validate.tolerances`` as tables, a column a precision."""
    parts = ["## Default budgets", ""]
    for task, defaults in (
        ("segmentation", config.DEFAULT_TOLERANCES),
        ("tensors", config.DEFAULT_TENSOR_TOLERANCES),
    ):
        rows = []
        for key in config.Tolerance.model_fields:
            values = [getattr(tolerance, key) for tolerance in defaults.values()]
            if any(value is not None for value in values):
                rows.append((f"`{key}`", *("" if value is None else yaml(value) for value in values)))
        parts += [f"`task: {task}`:", "", table((*("key",), *defaults), rows)]
    return "\n".join(parts)


# ---------------------------------------------------------------------- commands


def commands_page() -> str:
    root = typer.main.get_command(app)
    parts = [
        NOTE,
        "# Commands",
        "",
        "`unet-trt`, or `python -m pipeline`. `--debug` (tracebacks and every log message) and `--quiet` (warnings",
        "only) stand before or behind a command's name; `-h` explains each.",
        "",
        "Exit codes: 0 done and passed, 1 a check failed, 2 bad input, 3 this machine lacks what was asked for,",
        "130 interrupted. Results go to the standard output, everything else to the standard error.",
        "",
    ]
    for name, command in leaves(root, "unet-trt"):
        arguments = [one for one in command.params if one.param_type_name == "argument"]
        usage = " ".join([name, *(argument_usage(one) for one in arguments), "[options]"])
        rows = [parameter(one) for one in command.params]
        parts += [f"## {name}", "", clean_text(command.help), "", f"Usage: `{usage}`", ""]
        parts += [table(("parameter", "value", "default", "what"), rows)]
    return "\n".join(parts)


def leaves(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every command that does something, with its full name."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield name, command
    else:
        for word, each in inner.items():
            yield from leaves(each, f"{name} {word}")


def argument_usage(argument: Any) -> str:
    name = argument.name.upper() + (" …" if argument.nargs != 1 else "")
    return name if argument.required else f"[{name}]"


def parameter(one: Any) -> tuple[str, str, str, str]:
    annotation = one.type_descriptor.annotation
    if one.param_type_name == "argument":
        names = f"`{one.name.upper()}`"
    else:
        names = ", ".join(f"`{each}`" for each in (*one.opts, *one.secondary_opts))
    values = "" if getattr(one, "is_flag", False) else kind(annotation)
    if getattr(one, "multiple", False):
        values += ", repeatable"
    value = one.show_default if isinstance(one.show_default, str) else one.default
    shown = "" if value is None or value is False else "on" if value is True else f"`{value}`"
    return names, values, "**needed**" if one.required else shown, clean_text(one.help)


# ---------------------------------------------------------------------- Python


def python_page() -> str:
    parts = [
        NOTE,
        "# Python",
        "",
        "What programs may import; everything else may change. Arrays are numpy's, but for `GpuArray`.",
        "",
        "```python\nfrom pipeline import Prediction, Predictor\nfrom pipeline.errors import PipelineError\n```",
        "",
    ]
    for title, classes in PUBLIC.items():
        parts += [f"## {title}", ""]
        for module, name, file in classes:
            parts += class_text(module, name, file)
    parts += ["## Errors", "", markdown(pipeline.errors.__doc__ or ""), ""]
    parts += class_text("pipeline.errors", "PipelineError", "pipeline/errors.py")
    return "\n".join(parts).rstrip() + "\n"


def class_text(module: str, name: str, file: str) -> list[str]:
    """A class by its source, so that nothing heavy is imported: its call, its docstring, its public methods."""
    body = ast.parse((REPOSITORY / file).read_text(encoding="utf-8")).body
    (found,) = [node for node in body if isinstance(node, ast.ClassDef) and node.name == name]
    functions = [node for node in found.body if isinstance(node, ast.FunctionDef)]
    parts = [f"### {module}.{name}", ""]
    for node in functions:
        if node.name == "__init__":
            parts += [call(name, node), ""]
    parts += [markdown(ast.get_docstring(found) or ""), ""]
    for node in functions:
        text, decorators = ast.get_docstring(node), [ast.unparse(each) for each in node.decorator_list]
        if not text or (node.name.startswith("_") and node.name != "__call__"):
            continue
        if decorators == ["property"]:
            parts += [f"```text\n{name}.{node.name}: {ast.unparse(node.returns)}\n```", "", markdown(text), ""]
        elif not decorators:
            shown = name.lower() if node.name == "__call__" else f"{name.lower()}.{node.name}"
            parts += [call(shown, node), "", markdown(text), ""]
    return parts


def call(name: str, function: ast.FunctionDef) -> str:
    given = function.args
    defaults = [None] * (len(given.args) - len(given.defaults)) + given.defaults
    each = [argument(*pair) for pair in zip(given.args, defaults, strict=True)][1:]  # all but self
    if given.kwonlyargs:
        each += ["*", *(argument(*pair) for pair in zip(given.kwonlyargs, given.kw_defaults, strict=True))]
    returns = f" -> {ast.unparse(function.returns)}" if function.returns and function.name != "__init__" else ""
    line = f"{name}({', '.join(each)}){returns}"
    if len(line) > 100:
        line = "\n".join([f"{name}(", *(f"    {one}," for one in each), f"){returns}"])
    return f"```text\n{line}\n```"


def argument(one: ast.arg, value: ast.expr | None) -> str:
    text = ast.unparse(one)
    return text if value is None else f"{text} = {ast.unparse(value)}"


# ---------------------------------------------------------------------- text


def doc(thing: Any) -> str:
    return markdown(thing.__doc__ or "")


def first_line(model: type[BaseModel]) -> str:
    return clean_text((model.__doc__ or "").partition(PARAGRAPH)[0])


def clean_text(text: str | None) -> str:
    return " ".join((text or "").replace("``", "`").split())


def markdown(text: str) -> str:
    """A docstring as Markdown: paragraphs, `::` blocks, numbered lists, and the named sections as lists."""
    parts: list[str] = []
    literal = False
    for block in re.split(r"\n\s*\n", unindented(text)):
        heading, _, rest = block.partition("\n")
        if literal:
            parts.append(f"```text\n{textwrap.dedent(block)}\n```")
            literal = False
        elif block.strip() == "::":
            literal = True
        elif heading.rstrip(":") in SECTIONS and heading.endswith(":"):
            parts += [f"**{heading.removesuffix(':')}**", items(rest, named=heading != "Returns:")]
        else:
            parts.append(block.replace("``", "`"))
    return "\n\n".join(parts)


def unindented(text: str) -> str:
    """Without the indentation of all lines but the first."""
    first, _, rest = text.strip().partition("\n")
    return f"{first}\n{textwrap.dedent(rest)}".strip()


def items(text: str, named: bool) -> str:
    """The entries of a section as a list; what is indented deeper belongs to the line before."""
    entries: list[str] = []
    for line in textwrap.dedent(text).splitlines():
        if line.startswith(" ") or (not named and entries):
            entries[-1] += f" {line.strip()}"
        else:
            entries.append(line)
    lines = []
    for entry in entries:
        name, colon, rest = entry.replace("``", "`").partition(": ")
        code = ", ".join(f"`{each}`" for each in name.split(", "))
        lines.append(f"- {code}: {rest}" if named and colon else f"- {name}{colon}{rest}")
    return "\n".join(lines)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    REFERENCE.mkdir(exist_ok=True)
    for file, content in pages().items():
        (REFERENCE / file).write_text(content, encoding="utf-8")
