"""Every error the pipeline raises on purpose.

::

    PipelineError                   exit  a message of three parts: expected / got / what to do
    ├── InputError                  2     what the user gave cannot be used
    │   ├── ConfigError                   configuration file, command line, --set
    │   ├── DataError                     images, labels, splits
    │   ├── ModelError                    network, weights, ONNX file
    │   ├── CalibrationError              calibration images, table, cache
    │   ├── EngineError                   engine file, its manifest, a build that TensorRT refuses
    │   ├── ServerError                   inference server unreachable, not ready, without the model, refusing, too slow
    │   └── BuildFolderError              build folder unwritable, locked, damaged
    ├── CheckFailed                 1     a tolerance, an accuracy budget or a regression check
    └── UnsupportedError            3     this machine lacks what was asked for
"""

from __future__ import annotations

__all__ = [
    "BuildFolderError",
    "CalibrationError",
    "CheckFailed",
    "ConfigError",
    "DataError",
    "EngineError",
    "InputError",
    "ModelError",
    "PipelineError",
    "ServerError",
    "UnsupportedError",
]


class PipelineError(Exception):
    """Base of the tree.

    Args:
        problem: one sentence that names the thing at fault (file, key, tensor).
        expected: what would have been right.
        got: what came instead.
        fix: what to do about it.
    """

    exit_code = 2

    def __init__(self, problem: str, *, expected: str = "", got: str = "", fix: str = "") -> None:
        self.problem, self.expected, self.got, self.fix = problem, expected, got, fix
        parts = [("expected", expected), ("got", got), ("to fix", fix)]
        super().__init__("\n".join([problem, *(f"  {name}: {text}" for name, text in parts if text)]))

    @property
    def summary(self) -> str:
        """What is wrong, and what to do about it, in one line."""
        return f"{self.problem}; {self.fix}" if self.fix else self.problem


class InputError(PipelineError):
    """What the user gave cannot be used."""


class ConfigError(InputError):
    """A configuration file, command-line option or ``--set`` is wrong."""


class DataError(InputError):
    """An image, label map or split is wrong."""


class ModelError(InputError):
    """A network, weights file or ONNX file is wrong."""


class CalibrationError(InputError):
    """Calibration images, a calibration table or a calibration cache are wrong."""


class EngineError(InputError):
    """An engine file does not match its manifest or this machine, or TensorRT refused to build it."""


class ServerError(InputError):
    """An inference server cannot be reached, does not have the model ready, refuses a request or answers nonsense."""


class BuildFolderError(InputError):
    """The build folder is unwritable, locked by another process or damaged."""


class CheckFailed(PipelineError):
    """A tolerance, an accuracy budget or a regression check failed; the report is written nevertheless."""

    exit_code = 1


class UnsupportedError(PipelineError):
    """This machine lacks what was asked for: a GPU, a library, a capability."""

    exit_code = 3
