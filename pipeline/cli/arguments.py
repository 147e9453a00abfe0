"""From what was given to what stages take; what cannot be used is refused before the work begins."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pipeline.config import Config, Precision
    from pipeline.fleet.fleet import Fleet
    from pipeline.run import Run


def load_settings(
    config: Path | None, overrides: Sequence[str] | None, backend: str | None = None, route: str | None = None
) -> Config:
    """The configuration of -c with its overrides; an option that is given wins over them.

    Raises:
        ConfigError: there is no -c, or the configuration is not valid.
    """
    from pipeline.config import load_config

    extra = [f"engine.{key}={value}" for key, value in (("backend", backend), ("route", route)) if value]
    return load_config(required(config, "-c CONFIG"), [*(overrides or []), *extra])


def open_run(config: Config, build: Path, force: bool, fleet: Fleet | None = None) -> Run:
    """The composer in its build folder; workers of a fleet may have another working folder."""
    from pipeline.run import Run

    return Run(config, build.absolute() if fleet else build, force=force, fleet=fleet)


@contextlib.contextmanager
def open_fleet(distributed: bool, address: str | None, workers: int | None) -> Iterator[Fleet | None]:
    """Ray's workers where they are asked for.

    Raises:
        ConfigError: the other options are given without --distributed.
        ConfigError, UnsupportedError: as ``Fleet``.
    """
    if distributed:
        from pipeline.fleet.fleet import Fleet

        with Fleet(address, workers=workers) as fleet:
            yield fleet
        return
    if address is not None or workers is not None:
        from pipeline.errors import ConfigError

        raise ConfigError(
            f"--{'workers' if address is None else 'address'} is for a run on Ray", fix="add --distributed"
        )
    yield None


def precision_named(name: str) -> Precision:
    """The precision of this name.

    Raises:
        ConfigError: there is none.
    """
    from pipeline.config import ALL_PRECISIONS
    from pipeline.errors import ConfigError
    from pipeline.slips import nearest

    for precision in ALL_PRECISIONS:
        if precision == name:
            return precision
    near = nearest(name, ALL_PRECISIONS)
    raise ConfigError(f"there is no precision {name!r}{near}", expected=", ".join(ALL_PRECISIONS), got=name)


def chosen_precisions(config: Config, names: Sequence[str] | None) -> tuple[Precision, ...]:
    """Those of -p, each once, or else the configuration's.

    Raises:
        ConfigError: there is none of a name.
    """
    return tuple(dict.fromkeys(precision_named(name) for name in names)) if names else config.engine.precisions


def without_config(model: Path, config: Path | None, overrides: list[str] | None) -> None:
    """A model file is worked on without a configuration: one beside it would be ignored.

    Raises:
        ConfigError: there is one, or a key of one.
    """
    from pipeline.errors import ConfigError

    if config is not None or overrides:
        raise ConfigError(
            f"the model file {model} comes with a configuration",
            expected="either the file or -c CONFIG; --set belongs to the latter",
            got=" ".join(["-c"] * (config is not None) + ["--set"] * bool(overrides)),
            fix="write a configuration with network.onnx, or leave these options out",
        )


def required(value: Any, option: str) -> Any:
    """The value of an option that may be left out in other uses of the command.

    Raises:
        ConfigError: it is None.
    """
    from pipeline.errors import ConfigError

    if value is None:
        raise ConfigError(f"{option} is missing", expected=option, fix="see --help of this command")
    return value


def section_of(model: Any, values: dict[str, Any]) -> Any:
    """A section of the configuration, such as ``CleanConfig``, made of options.

    Raises:
        ConfigError: a value, or a combination of them, is not allowed.
    """
    from pydantic import ValidationError

    from pipeline.errors import ConfigError

    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        # What forbids a combination of keys has no place of its own.
        place, got = ([str(first["loc"][0])], str(first["input"])) if first["loc"] else ([], "")
        raise ConfigError(": ".join([*place, first["msg"].removeprefix("Value error, ")]), got=got) from error


def card_of(model: Path) -> Any:
    """The ``ModelCard`` of a model file.

    Raises:
        ModelError: it is missing or damaged, or has none.
        EngineError: the manifest of an engine is.
    """
    from pipeline.facts import required_card
    from pipeline.opening import read_facts

    return required_card(read_facts(model).card, model)


def own_file(output: Path, inputs: Sequence[Path]) -> Path:
    """The file, where it would take the place of no folder and of nothing that it is made from.

    Raises:
        BuildFolderError: it would.
    """
    from pipeline.errors import BuildFolderError

    if output.is_dir():
        raise BuildFolderError(f"{output} is a folder", expected="a file to write", fix="name a file with -o")
    for path in inputs:
        if path.resolve() == output.resolve():
            raise BuildFolderError(f"{output} would overwrite what it is made from", fix="choose another with -o")
    return output
