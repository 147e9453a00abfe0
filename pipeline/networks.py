"""Torch networks from a factory and a weights file."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pipeline.calibration.table import some
from pipeline.config import NetworkConfig
from pipeline.errors import ModelError, UnsupportedError
from pipeline.slips import did_you_mean
from pipeline.wts import Form, read_wts, shaped

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

log = logging.getLogger(__name__)

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
PREFIXES = ("module.", "_orig_mod.", "model.")
T = TypeVar("T")


def build_network(config: NetworkConfig) -> nn.Module:
    """The network of a config in eval mode, float32, on the CPU, with its weights loaded (where the config names any).

    ``.wts`` weights take their shapes from the network, so its arguments are the config's alone.

    Raises:
        ModelError: the factory cannot be imported or refuses its arguments; weights are missing, unreadable, would run
            code when read, or belong to another architecture (the differing keys are named).
        UnsupportedError: torch is not installed.
    """
    torch = _torch()
    assert config.factory is not None
    factory = _import(config.factory)
    flat = config.weights is not None and config.weights.suffix == ".wts"
    state = read_state_dict(config.weights) if config.weights and not flat else None
    arguments = dict(config.arguments)
    if state is not None and hasattr(factory, "infer_arguments"):
        arguments = {**factory.infer_arguments(state), **arguments}
    try:
        network = factory(**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{config.factory} refuses its arguments: {error}", got=repr(arguments), fix="correct network.arguments"
        ) from error
    if not isinstance(network, torch.nn.Module):
        raise ModelError(f"{config.factory} returns no torch.nn.Module", got=type(network).__name__)
    if config.weights is not None and flat:
        forms = {name: form_of(tensor) for name, tensor in network.state_dict().items()}
        arrays = shaped(read_wts(config.weights), forms, config.weights)
        state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if state is not None:
        _load(network, state, config)
    network.eval()
    return cast("nn.Module", network)


def form_of(tensor: Tensor) -> Form:
    """Shape and type of a tensor."""
    return Form(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name, as float32, from ``.safetensors``, or from ``.pth``/``.pt`` read with ``weights_only=True``.

    Full checkpoints with a ``state_dict``/``model_state_dict`` inside and names with a ``module.`` prefix are
    unwrapped. Floating-point tensors of any width become float32.

    Raises:
        ModelError: the file is missing, damaged, of another kind, or would run code when read.
    """
    _check_exists(path)
    torch = _torch()
    state: Any
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state = load_file(path)
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from error
    elif path.suffix in (".pth", ".pt"):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if "weights_only" not in str(error).lower() and "unsupported" not in str(error).lower():
                raise _damaged(path, error) from error
            raise ModelError(
                f"{path} holds pickled objects beside tensors, and reading those would run code from the file",
                expected="a state dict of tensors alone",
                fix="where you trust the file, run once: torch.save(torch.load(PATH, weights_only=False)"
                ".state_dict(), NEW_PATH), and use NEW_PATH",
            ) from error
        except (RuntimeError, EOFError, ValueError, OSError) as error:
            raise _damaged(path, error) from error
    else:
        raise ModelError(f"{path} has no known ending", expected=".safetensors, .pth or .pt", got=path.suffix or "none")
    return {name: t.float() if t.is_floating_point() else t for name, t in _unwrap(state, path).items()}


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Tensors by name as arrays, in the file's types and shapes; flat float32 of ``.wts``, which holds no others.

    Reads ``.wts``, and ``.safetensors`` of types that numpy has, without torch; everything else as ``read_state_dict``.

    Raises:
        ModelError: the file is missing, damaged, of another kind, or would run code when read.
        UnsupportedError: torch is needed and not installed.
    """
    if path.suffix == ".wts":
        return dict(read_wts(path))
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        _check_exists(path)
        try:
            return _without_prefixes(load_file(path))
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from error
        except (AttributeError, KeyError, TypeError) as error:  # bfloat16 and others, which numpy does not have
            log.debug("%s is read with torch: %s", path, error)
    return {name: tensor.numpy() for name, tensor in read_state_dict(path).items()}


def _unwrap(state: Any, path: Path) -> dict[str, Tensor]:
    torch = _torch()
    for wrapper in WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
            break
    tensors = {k: v for k, v in state.items() if torch.is_tensor(v)} if isinstance(state, Mapping) else {}
    if not tensors:
        raise ModelError(f"{path} holds no state dict", expected="tensors by name", got=type(state).__name__)
    return _without_prefixes(tensors)


def _without_prefixes(tensors: dict[str, T]) -> dict[str, T]:
    """The tensors without the prefixes that wrappers put before every name."""
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _load(network: nn.Module, state: Mapping[str, Tensor], config: NetworkConfig) -> None:
    own = network.state_dict()
    # Counters of BatchNorm are absent from checkpoints older than torch 0.4.1 and change nothing in eval mode.
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    surplus = [k for k in state if k not in own and not k.endswith("num_batches_tracked")]
    shapes = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if missing or surplus or shapes:
        differences = [("missing", missing), ("unknown", surplus), ("other shape", shapes)]
        raise ModelError(
            f"{config.weights} holds weights of another architecture than {config.factory}",
            got="; ".join(f"{name}: {some(keys)}" for name, keys in differences if keys),
            fix="set network.factory and network.arguments to what the weights were trained with",
        )
    network.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise ModelError(
            f"the weights file {path} does not exist{did_you_mean(path)}",
            expected="a .safetensors, .wts, .pth or .pt file",
            fix="correct network.weights, or make the weights with `unet-trt train`",
        )


def _unreadable(path: Path, error: Exception) -> ModelError:
    return ModelError(f"{path} is not a readable safetensors file: {error}", fix="copy it again")


def _damaged(path: Path, error: Exception) -> ModelError:
    return ModelError(f"{path} is not a readable torch checkpoint: {error}", fix="copy it again, or save it again")


def _import(factory: str) -> Any:
    module, _, name = factory.partition(":")
    _see_current_folder()
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ModelError(
            f"the network factory {factory} cannot be imported: {error}",
            expected="package.module:callable, importable from the current folder or the environment",
            fix="correct network.factory, or install the package that holds it",
        ) from error


def factory_file(factory: str) -> Path | None:
    """The file that defines a factory; None where it cannot be found (building the network says so)."""
    _see_current_folder()
    try:
        spec = importlib.util.find_spec(factory.partition(":")[0])
    except (ImportError, ValueError, SyntaxError):
        return None
    return Path(spec.origin) if spec is not None and spec.origin else None


def _see_current_folder() -> None:
    if "" not in sys.path:
        sys.path.insert(0, "")


def fastest_device() -> Any:
    """The GPU where torch has one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise UnsupportedError(
            "torch is not installed, so no network can be exported or trained here",
            fix="pip install torch, or start from an exported file with network.onnx",
        ) from error
    return torch
