"""Engines of one clean graph for whatever GPU it meets: built on first use, and kept by what they are for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.artifacts import sha256_file, sha256_json, workshop
from pipeline.backends.registry import resolve
from pipeline.calibration.table import read_cache
from pipeline.config import EngineConfig, Precision
from pipeline.engines import read_manifest
from pipeline.errors import EngineError, UnsupportedError
from pipeline.graph.io import load_model, read_card, sha256_model
from pipeline.predictor import Predictor
from pipeline.stages.engine import ENGINE, build_engine


@dataclass(frozen=True)
class GpuEngines:
    """Where the engine for this machine's GPU comes from; pickled, it does its work where it is unpickled.

    Attributes:
        clean: the clean graph, with its card.
        cache: calibration cache, for INT8.
        folder: with a folder for each engine, named by GPU and key; shared by the machines of a fleet.
    """

    clean: Path
    precision: Precision
    config: EngineConfig
    cache: Path | None
    folder: Path

    @cached_property
    def identity(self) -> str:
        """sha256 of what the engines are made from, whichever GPU they are for."""
        cache = sha256_file(self.cache) if self.cache else None
        return sha256_json(
            [sha256_model(self.clean), cache, self.precision, self.config.model_dump(mode="json", by_alias=True)]
        )

    def engine(self) -> Path:
        """The engine for this GPU, driver and library; built where it is not there yet, by one process at a time.

        Raises:
            UnsupportedError: none can be built here.
            CalibrationError, ConfigError, EngineError, ModelError: as ``build_engine``.
            BuildFolderError: the folder is unwritable or full.
        """
        target = resolve(self.config.backend, self.precision, self.config.route)
        if target.builder is None:
            raise UnsupportedError("ONNX Runtime builds no engines", fix="leave -p out to run the ONNX file itself")
        device = target.capabilities.device
        key = sha256_json([self.identity, target.identity()])
        name = "".join(c if c.isalnum() else "-" for c in device.name) if device else target.capabilities.name
        kept = self.folder / f"{name}-{key[:16]}"
        with workshop(kept / ENGINE) as made:
            if not _is_whole(kept):
                table = read_cache(self.cache) if self.cache else None
                cache_sha256 = sha256_file(self.cache) if self.cache else None
                card = read_card(load_model(self.clean))
                build_engine(self.clean, self.precision, self.config, table, cache_sha256, card, made, None)
                for file in sorted(made.iterdir()):
                    file.replace(kept / file.name)
        return kept / ENGINE

    def predictor(self, card: Path | None, **options: Any) -> Predictor:
        """A predictor with the engine for this GPU; ``options`` are ``Predictor``'s."""
        return Predictor(self.engine(), card, **options)


def _is_whole(folder: Path) -> bool:
    try:
        return read_manifest(folder).engine_sha256 == sha256_file(folder / ENGINE)
    except (EngineError, OSError):
        return False
