"""A model that other processes reach by an address."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import AuthenticationError
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.artifacts import TensorSpec
from pipeline.backends.distant import DistantModel, SharedMemory
from pipeline.backends.doors import Address, Visit
from pipeline.errors import EngineError, ModelError
from tests.conftest import REPOSITORY

MODEL = DistantModel(
    (TensorSpec("x", ("batch", 2), "float32"),), (TensorSpec("y", ("batch", 3), "float32"),), {}, {}, False
)


def model(arrays: Iterable[NDArray[Any]]) -> Generator[NDArray[Any], None, None]:
    """The sum three times; fails at 13, in a way that cannot be pickled at 14, and ends its process at 666."""
    for array in arrays:
        total = array.sum()
        if total == 13:
            raise EngineError("thirteen", fix="another number")
        if total == 14:
            raise OSError(lambda: None)
        if total == 666:
            os._exit(1)
        yield np.full(3, total, np.float32)


PROGRAM = f"""
import sys
from {__name__} import model
from pipeline.backends.doors import Door
address = Door(model).address
print(address.name, address.key.hex(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def address() -> Iterator[Address]:
    """Of another process."""
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as process:
        assert process.stdout is not None
        name, key = process.stdout.readline().split()
        yield Address(name, bytes.fromhex(key))


def asked(visit: Visit, *values: float) -> NDArray[Any]:
    batch = np.array([[value, 0] for value in values], np.float32)
    return visit.runner({"x": batch})["y"]


def test_visitors_are_answered_each_with_their_own(address: Address) -> None:
    def ask(number: int) -> None:
        with Visit(address, MODEL) as visit:
            for count in (1, 5, 2000):
                values = 1000 * number + np.arange(count)
                np.testing.assert_array_equal(asked(visit, *values), np.stack([values] * 3, 1))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(1, 21)))


def test_what_the_model_raises_is_raised_and_the_way_stays(address: Address) -> None:
    with Visit(address, MODEL) as visit:
        for _ in range(2):
            with pytest.raises(EngineError, match="thirteen") as caught:
                asked(visit, 1, 13)
            assert caught.value.fix == "another number"
            with pytest.raises(ModelError, match="OSError"):
                asked(visit, 14)
            assert asked(visit, 7)[0, 0] == 7


def test_the_end_of_the_other_side_shows_as_such(address: Address) -> None:
    with Visit(address, MODEL) as visit:
        for _ in range(2):
            with pytest.raises(ConnectionError):
                asked(visit, 666)


def test_a_python_without_memory_to_share_says_so(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.memfd_create")
    with pytest.raises(OSError, match="memfd_create"):
        Visit(address, MODEL)


def test_memory_goes_with_its_last_reference() -> None:
    memory = SharedMemory()
    descriptor = memory.descriptor
    assert memory.array((3,), "<f4").size == 3
    del memory
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(descriptor)


def test_nobody_comes_in_without_the_key_or_after_the_process(address: Address) -> None:
    with pytest.raises(AuthenticationError):
        Visit(replace(address, key=b"guessed"), MODEL)
    with Visit(address, MODEL) as visit:  # others still do
        assert asked(visit, 2)[0, 2] == 2
        with pytest.raises(ConnectionError):
            asked(visit, 666)
    with pytest.raises(ConnectionError):
        Visit(address, MODEL)
