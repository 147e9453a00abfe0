"""What lies in a build folder, from what it was made, and whether it may be used again: ``run.json``.

A stage is skipped when its key, the versions of its tools and the hashes of its outputs are those on record. The key
is the sha256 over the hashes of what it is made from, its slice of the config, and this program's own source. A tool
that is not installed here cannot make anything anew, so the recorded version stands: a folder exported elsewhere is
used as it is on a GPU host without torch.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, TypedDict

from pydantic import BaseModel
from pydantic.dataclasses import dataclass

from pipeline.artifacts import (
    SCHEMA_VERSION,
    build_lock,
    from_json,
    replaced_folder,
    sha256_file,
    sha256_json,
    sweep,
    to_json,
    tool_version,
    write_atomically,
)
from pipeline.errors import BuildFolderError
from pipeline.progress import working

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageRecord:
    """What a stage made, from what, with which tools, and how long it took."""

    key: str
    tools: dict[str, str | None]
    outputs: dict[str, str]
    seconds: float
    made: str


@dataclass(frozen=True)
class RunRecord:
    """``run.json``: every stage by name (``export``, ``engine/int8``, …); output paths are relative to the folder."""

    config: str
    stages: dict[str, StageRecord]
    schema_version: int = field(default=SCHEMA_VERSION)


class Origin(TypedDict):
    """What a stage is made from and with, as ``BuildFolder.stage`` takes it."""

    config: Sequence[Any]
    parents: Mapping[str, str | None]
    tools: Sequence[str]


class BuildFolder:
    """The folder of one config and its record; a context manager, which holds the folder's lock.

    Args:
        name: of the config.
        force: make every stage anew.
    """

    def __init__(self, folder: Path, name: str, *, force: bool) -> None:
        self.folder, self.name, self.force = folder, name, force
        self.record = RunRecord(name, {})
        self._settled: set[str] = set()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> BuildFolder:
        self._stack.enter_context(build_lock(self.folder))
        sweep(self.folder)
        file = self.folder / "run.json"
        if file.is_file():
            try:
                self.record = from_json(RunRecord, file)
            except BuildFolderError as error:
                log.warning("%s; every stage runs again", error.problem)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def stage(
        self,
        name: str,
        make: Callable[[Path], object],
        *,
        config: Sequence[Any],
        parents: Mapping[str, str | None],
        tools: Sequence[str],
        keep: Callable[[Path], bool] = lambda folder: True,
    ) -> Path:
        """Make ``<folder>/<name>`` or reuse it; ``keep`` says whether the result may be reused later."""
        target = self.folder / name
        if name in self._settled:
            return target
        if not self.force and self.is_current(name, config=config, parents=parents, tools=tools):
            log.info("%s: unchanged, reused", name)
        else:
            log.info("%s: running", name)
            started = time.perf_counter()
            self._remember(name, None)
            with working(name), replaced_folder(target) as folder:
                make(folder)
            seconds = time.perf_counter() - started
            files = sorted(path for path in target.rglob("*") if path.is_file())
            outputs = {str(path.relative_to(target)): sha256_file(path) for path in files}
            made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            if keep(target):
                key, versions = _key(name, config, parents), {tool: tool_version(tool) for tool in tools}
                self._remember(name, StageRecord(key, versions, outputs, seconds, made))
            log.info("%s: done in %.1f s", name, seconds)
        self._settled.add(name)
        return target

    def is_current(
        self, name: str, *, config: Sequence[Any], parents: Mapping[str, str | None], tools: Sequence[str]
    ) -> bool:
        """Whether what is on record was made from the same, with the same tools, and lies there as it was made."""
        old = self.record.stages.get(name)
        if old is None or old.key != _key(name, config, parents):
            return False
        versions = {tool: tool_version(tool) for tool in tools}
        files = {self.folder / name / file: sha for file, sha in old.outputs.items()}
        return all(version in (None, old.tools.get(tool)) for tool, version in versions.items()) and all(
            file.is_file() and sha256_file(file) == sha for file, sha in files.items()
        )

    def outputs(self) -> dict[str, str]:
        """sha256 of every file on record, by ``<stage>/<file>``."""
        stages = self.record.stages.items()
        return {f"{name}/{file}": sha for name, stage in stages for file, sha in stage.outputs.items()}

    def tools(self) -> dict[str, str]:
        """Versions of the tools that made them."""
        found = {tool: version for stage in self.record.stages.values() for tool, version in stage.tools.items()}
        return {tool: version for tool, version in sorted(found.items()) if version}

    def _remember(self, name: str, stage: StageRecord | None) -> None:
        stages = {k: v for k, v in self.record.stages.items() if k != name}
        if stage is not None:
            stages[name] = stage
        self.record = RunRecord(self.name, stages)
        write_atomically(self.folder / "run.json", to_json(self.record))


def hash_of(path: Path | None) -> str | None:
    """The file's sha256; None where there is none."""
    return sha256_file(path) if path is not None and path.is_file() else None


def _key(name: str, config: Sequence[Any], parents: Mapping[str, str | None]) -> str:
    return sha256_json([name, [_plain(part) for part in config], dict(parents), _own_source()])


def _plain(part: Any) -> Any:
    if isinstance(part, BaseModel):
        return part.model_dump(mode="json")
    if hasattr(part, "__dataclass_fields__"):
        from pydantic import TypeAdapter

        return TypeAdapter(type(part)).dump_python(part, mode="json")
    if isinstance(part, dict):
        return {key: _plain(value) for key, value in part.items()}
    return part


@functools.cache
def _own_source() -> str:
    """Hash over this program's own modules: another version of it makes everything anew."""
    package = Path(__file__).parent
    return sha256_json([(str(f.relative_to(package)), sha256_file(f)) for f in _sources(package)])


def _sources(package: Path) -> Iterator[Path]:
    for folder, _, files in sorted(os.walk(package)):
        yield from (Path(folder, file) for file in sorted(files) if file.endswith((".py", ".j2")))
