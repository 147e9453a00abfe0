"""Addresses of served models, and what is missing on this side; ``tests/integration/test_serving.py`` has a server."""

from __future__ import annotations

import sys

import pytest

from pipeline.backends.remote import RemoteRunner, parse_address
from pipeline.errors import ConfigError, UnsupportedError


def test_addresses() -> None:
    for text in ("grpc://localhost:8001/cells", "http://[::1]:8000/cells/3", "http://host/v1.2_x/12"):
        assert str(parse_address(text)) == text
    assert parse_address("grpc://h:1/cells/3").version == "3"


@pytest.mark.parametrize(
    "text",
    [
        "localhost:8001/cells",
        "ftp://host/cells",
        "grpc://host:8001",
        "grpc://host:8001/",
        "grpc://host/a/b",
        "grpc:///a",
    ],
)
def test_no_addresses(text: str) -> None:
    with pytest.raises(ConfigError, match="no address of a served model"):
        RemoteRunner(text)


def test_no_time() -> None:
    with pytest.raises(ConfigError, match="timeout of 0"):
        RemoteRunner("grpc://localhost:8001/cells", timeout=0)


def test_without_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    with pytest.raises(UnsupportedError, match="needs tritonclient"):
        RemoteRunner("grpc://localhost:8001/cells")
