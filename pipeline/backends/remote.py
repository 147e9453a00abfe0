"""A model on an inference server that speaks KServe's protocol v2, as Triton does, through ``tritonclient``."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from pipeline.artifacts import SCHEMA_VERSION, Profile, ServedModel, TensorSpec
from pipeline.backends.base import Arrays, check_feeds
from pipeline.closing import Closing
from pipeline.errors import ConfigError, ServerError, UnsupportedError

# Parameters of ``config.pbtxt``: a ``ServedModel`` as JSON, and the sha256 of each version's model file.
MODEL_KEY = "unet_trt.model"
SHA256_KEY = "unet_trt.sha256."
TIMEOUT = 60.0
ADDRESS = re.compile(r"(grpc|http)://([^/\s]+)/([^/\s]+)(?:/(\d+))?")
# KServe's names of types to numpy's.
DTYPES = {"FP16": "float16", "FP32": "float32", "FP64": "float64", "BOOL": "bool"}
# Sizes without a bound, for ``Profile``.
UNBOUNDED = 2**31 - 1


@dataclass(frozen=True)
class Address:
    """``grpc://HOST:PORT/MODEL[/VERSION]``, or ``http://``."""

    scheme: str
    place: str
    model: str
    version: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.place}/{self.model}" + (f"/{self.version}" if self.version else "")


def is_address(model: object) -> bool:
    """Whether a model is named by an address of a server, not by a file."""
    return isinstance(model, str) and "://" in model


def parse_address(text: str) -> Address:
    """The parts of an address; no version means the newest that is served.

    Raises:
        ConfigError: it is none.
    """
    match = ADDRESS.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"{text} is no address of a served model",
            expected="grpc://HOST:PORT/MODEL or http://HOST:PORT/MODEL, with /VERSION behind it for a certain one",
        )
    scheme, place, model, version = match.groups()
    return Address(scheme, place, model, version or "")


class RemoteRunner(Closing):
    """A served model as a runner. Unlike others, it may be given several batches before the first is answered.

    Requests go out one after another on a thread of its own, which is the only one to touch the connection: the HTTP
    client is bound to its thread. ``twin`` makes another, for requests beside these. All requests name the version
    that was found at first, so that a model that is exchanged meanwhile does not mix its results with the old one's.

    Args:
        address: ``grpc://HOST:PORT/MODEL[/VERSION]``, or ``http://``.
        timeout: seconds that a request may take; the server drops it from its queue then too.

    Attributes:
        inputs, outputs: as the server says, batch included.
        profiles: sizes that the input takes.
        served: what the model was packaged with; None for one from elsewhere.
        sha256: of the file of the served version; empty for a model from elsewhere.

    Raises:
        ConfigError: no address, no positive timeout.
        UnsupportedError: ``tritonclient`` is not installed.
        ServerError: the server cannot be reached, is no inference server, or does not have the model ready.
    """

    def __init__(self, address: str, timeout: float = TIMEOUT) -> None:
        if timeout <= 0:
            raise ConfigError(f"a timeout of {timeout} seconds", expected="more than 0")
        self._timeout = timeout
        self._connect(parse_address(address))
        try:
            self._ask(self._open)
        except BaseException:
            self.close()
            raise

    def __str__(self) -> str:
        return str(self.address)

    def __call__(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        return self.submit(feeds).result()

    def submit(self, feeds: Arrays) -> Future[dict[str, NDArray[Any]]]:
        """Send a batch off; the arrays may not change until it is answered.

        Raises:
            ValueError: the model does not take it, which is seen without asking.
            ServerError: from the result: the server refuses it, does not answer in time, or answers nonsense.
        """
        check_feeds(self.inputs, feeds)
        return self._thread.submit(self._infer, feeds)

    def twin(self) -> RemoteRunner:
        """Another connection to the same version of the same model."""
        twin = object.__new__(RemoteRunner)
        twin.__dict__.update(self.__dict__)
        twin._connect(self.address)
        return twin

    def close(self) -> None:
        self._thread.submit(self._client.close)
        self._thread.shutdown()

    # ------------------------------------------------------------------ opening

    def _connect(self, address: Address) -> None:
        self.address = address
        self._thread = ThreadPoolExecutor(1, "requests")
        try:
            self._client = self._thread.submit(_client, address, self._timeout).result()
        except BaseException:
            self._thread.shutdown()
            raise

    def _ask(self, question: Callable[[], None]) -> None:
        self._thread.submit(question).result()

    def _open(self) -> None:
        with _mapped(self.address, self._timeout):
            client, name = self._client, self.address.model
            if not client.is_server_live():
                raise ServerError(f"{self.address.place} is no inference server that works", fix="check the address")
            if not client.is_model_ready(name, self.address.version):
                raise self._not_ready()
            metadata = client.get_model_metadata(name, self.address.version)
            version = self.address.version or max(metadata.get("versions", ()), key=int, default="")
            config = client.get_model_config(name, version)
        try:
            self._read(metadata, config, version)
        except (KeyError, TypeError, ValueError) as error:
            raise ServerError(f"what {self.address} says of the model is not understood: {error!r}") from error
        self.address = Address(self.address.scheme, self.address.place, name, version)

    def _read(self, metadata: Mapping[str, Any], config: Mapping[str, Any], version: str) -> None:
        parameters = {key: value.get("string_value", "") for key, value in config.get("parameters", {}).items()}
        self.served = _served(parameters.get(MODEL_KEY), self.address)
        self.sha256 = parameters.get(f"{SHA256_KEY}{version}", "")
        self.inputs = tuple(_spec(tensor) for tensor in metadata["inputs"])
        self.outputs = tuple(_spec(tensor) for tensor in metadata["outputs"])
        most = int(config.get("max_batch_size", 0))
        known = self.served.profiles if self.served else {}
        self.profiles = {spec.name: known.get(spec.name, _profile(spec, most)) for spec in self.inputs if _free(spec)}

    def _not_ready(self) -> ServerError:
        """Why a model cannot be used: the repository's index says, where the server tells it."""
        name, version = self.address.model, self.address.version
        index = self._client.get_model_repository_index()
        known = [row for row in index if row["name"] == name]
        if not known:
            names = ", ".join(sorted({row["name"] for row in index})) or "none"
            return ServerError(f"{self.address.place} has no model {name}", expected=names, fix="check its name")
        ready = sorted((row["version"] for row in known if row.get("state") == "READY"), key=int)
        if version and version not in {row.get("version") for row in known}:
            served = ", ".join(ready) or "none that is ready"
            return ServerError(
                f"{self.address.place} does not serve version {version} of {name}",
                expected=f"a version that it serves: {served}",
                got=version,
                fix="leave the version out for the newest, or change the server's version_policy",
            )
        states = [f"{row.get('state', 'not loaded')} {row.get('reason', '')}".strip() for row in known]
        return ServerError(
            f"{self.address} is not ready",
            got="; ".join(states),
            fix="wait for it, or see the server's log",
        )

    # ------------------------------------------------------------------ requests

    def _infer(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        with _mapped(self.address, self._timeout):
            names = [spec.name for spec in self.outputs]
            results, version = self._client.infer(self.address.model, self.address.version, feeds, names)
        batch = next(iter(feeds.values())).shape[0]
        outputs: dict[str, NDArray[Any]] = {}
        for spec in self.outputs:
            result = results[spec.name]
            if result is None or _unlike(result, spec) or len(result) != batch:
                raise ServerError(
                    f"{self.address} gives another {spec.name} than it says",
                    expected=f"{spec.dtype} {spec.shape} for a batch of {batch}",
                    got="nothing, or half of it" if result is None else f"{result.dtype} {result.shape}",
                    fix="see the server's log",
                )
            outputs[spec.name] = result
        if version != self.address.version:
            raise ServerError(
                f"{self.address.place} answers with another version of {self.address.model}",
                expected=self.address.version,
                got=version,
            )
        return outputs


class _Client:
    """What is asked of a server, the same by either way; JSON as the protocol has it."""

    def __init__(self, kind: Any, place: str, timeout: float, limit: Mapping[str, float], **options: Any) -> None:
        self._kind = kind
        self._client = kind.InferenceServerClient(place, **options)
        self._limit = dict(limit)
        self._json = {"as_json": True} if limit else {}
        self._microseconds = int(timeout * 1e6)
        self.close = self._client.close

    def is_server_live(self) -> bool:
        return bool(self._client.is_server_live(**self._limit))

    def is_model_ready(self, name: str, version: str) -> bool:
        return bool(self._client.is_model_ready(name, version, **self._limit))

    def get_model_metadata(self, name: str, version: str) -> dict[str, Any]:
        return dict(self._client.get_model_metadata(name, version, **self._json, **self._limit))

    def get_model_config(self, name: str, version: str) -> dict[str, Any]:
        config = self._client.get_model_config(name, version, **self._json, **self._limit)
        return dict(config.get("config", config))

    def get_model_repository_index(self) -> list[dict[str, Any]]:
        index = self._client.get_model_repository_index(**self._json, **self._limit)
        return list(index.get("models", []) if isinstance(index, dict) else index)

    def infer(
        self, name: str, version: str, feeds: Arrays, outputs: list[str]
    ) -> tuple[dict[str, NDArray[Any] | None], str]:
        """The outputs, and the version that gave them."""
        from tritonclient.utils import np_to_triton_dtype

        inputs = []
        for key, array in feeds.items():
            inputs.append(self._kind.InferInput(key, array.shape, np_to_triton_dtype(array.dtype)))
            inputs[-1].set_data_from_numpy(array)
        wanted = [self._kind.InferRequestedOutput(key) for key in outputs]
        answer = self._client.infer(
            name, inputs, model_version=version, outputs=wanted, timeout=self._microseconds, **self._limit
        )
        response = answer.get_response()
        got = response["model_version"] if isinstance(response, dict) else response.model_version
        try:
            return {key: answer.as_numpy(key) for key in outputs}, str(got)
        except ValueError:  # less or more bytes than the shape has
            return dict.fromkeys(outputs), str(got)


def _client(address: Address, timeout: float) -> _Client:
    try:
        import tritonclient.grpc as grpc
        import tritonclient.http as http
    except ImportError as error:
        raise UnsupportedError(
            f"predicting on a server needs tritonclient: {error}", fix="pip install 'unet-trt[serve]'"
        ) from error
    if address.scheme == "grpc":
        return _Client(grpc, address.place, timeout, {"client_timeout": timeout})
    return _Client(http, address.place, timeout, {}, connection_timeout=timeout, network_timeout=timeout)


@contextlib.contextmanager
def _mapped(address: Address, timeout: float) -> Iterator[None]:
    """What the two clients and the libraries below them raise, as ServerError."""
    from geventhttpclient.response import HTTPParseError
    from tritonclient.utils import InferenceServerException

    try:
        yield
    except InferenceServerException as error:
        raise _refused(address, timeout, str(error.status() or ""), str(error.message() or "")) from error
    except TimeoutError as error:
        raise _slow(address, timeout) from error
    except OSError as error:
        raise _unreachable(address, error.strerror or str(error)) from error
    except (HTTPParseError, ValueError, RuntimeError) as error:  # RuntimeError: a host name that does not resolve
        raise _unreachable(address, str(error) or type(error).__name__) from error


def _refused(address: Address, timeout: float, status: str, message: str) -> ServerError:
    message = " ".join(message.split())
    if "DEADLINE_EXCEEDED" in status or "Deadline Exceeded" in message or "timeout expired" in message:
        return _slow(address, timeout)
    if "UNAVAILABLE" in status and not any(word in message for word in ("model", "queue")):
        return _unreachable(address, message)
    if "UNIMPLEMENTED" in status or (status == "404" and "exception occurred in the client" in message):
        return ServerError(
            f"{address.place} does not speak Triton's protocol: {message}",
            expected="KServe's protocol v2 with model configuration, as Triton serves it",
            fix="check the port: Triton takes HTTP on 8000 and gRPC on 8001",
        )
    return ServerError(
        f"{address} refuses: {message}",
        got=f"status {status}" if status else "",
        fix="see the message; an earlier run goes on with --resume",
    )


def _slow(address: Address, timeout: float) -> ServerError:
    return ServerError(
        f"{address} does not answer within {timeout:g} s",
        fix="allow more with --timeout, send less at a time with --batch or --streams, or add instances to the server",
    )


def _unreachable(address: Address, reason: str) -> ServerError:
    return ServerError(
        f"{address.scheme}://{address.place} cannot be reached: {' '.join(reason.split())}",
        expected="a running server, and grpc:// for its gRPC port (Triton: 8001) or http:// for its HTTP port (8000)",
        fix="start the server, or check host and port",
    )


def _served(text: str | None, address: Address) -> ServedModel | None:
    if text is None:
        return None
    try:
        served = TypeAdapter(ServedModel).validate_json(text)
    except ValidationError as error:
        raise _other_version(address, error.errors()[0]["msg"]) from error
    if served.schema_version != SCHEMA_VERSION:
        raise _other_version(address, f"schema {served.schema_version}")
    return served


def _other_version(address: Address, got: str) -> ServerError:
    return ServerError(
        f"{address} was packaged by another version of unet-trt",
        expected=f"the parameter {MODEL_KEY} of schema {SCHEMA_VERSION}",
        got=got,
        fix="package the model again, or use that version",
    )


def _spec(tensor: Mapping[str, Any]) -> TensorSpec:
    """A tensor of the metadata; sizes that are free, -1, are called by their role."""
    kind, shape = tensor["datatype"], [int(size) for size in tensor["shape"]]
    dtype = np.dtype(DTYPES.get(kind, kind.lower())).name
    roles = ["batch", "height", "width"] if dtype == "uint8" else ["batch", "channels", "height", "width"]
    names = [*roles, *(f"axis_{place}" for place in range(len(roles), len(shape)))]
    sizes = (name if size < 0 else size for name, size in zip(names, shape, strict=False))
    return TensorSpec(tensor["name"], tuple(sizes), dtype)


def _free(spec: TensorSpec) -> bool:
    return any(isinstance(size, str) for size in spec.shape)


def _profile(spec: TensorSpec, most: int) -> Profile:
    """Any size, and batches up to what the server takes."""
    low = tuple(size if isinstance(size, int) else 1 for size in spec.shape)
    high = [size if isinstance(size, int) else UNBOUNDED for size in spec.shape]
    if most:
        high[0] = most
    return Profile(low, low, tuple(high))


def _unlike(array: NDArray[Any], spec: TensorSpec) -> bool:
    sizes = zip(spec.shape, array.shape, strict=False)
    fits = array.ndim == len(spec.shape) and all(isinstance(want, str) or want == have for want, have in sizes)
    return not fits or array.dtype != np.dtype(spec.dtype)
