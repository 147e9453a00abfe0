"""Ways for processes of this machine to a model that one of them has, found by an address instead of by parentage."""

from __future__ import annotations

import contextlib
import errno
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from multiprocessing.reduction import recv_handle, send_handle

from pipeline.backends.distant import DistantModel, DistantRunner, Model, SharedMemory, answer
from pipeline.closing import Closing

KEY_BYTES = 32
# Processes that may come at once.
WAITING = 128
PAUSE_SECONDS = 0.1


@dataclass(frozen=True)
class Address:
    """Of a door, for those that may come in.

    Attributes:
        name: of a socket, as Linux has them without a file.
        key: which both sides prove that they have.
    """

    name: str
    key: bytes


class Door:
    """Lets processes come to a model, and answers each on a thread of its own, as long as this process lasts.

    Attributes:
        address: for those that may come in.

    Raises:
        OSError: the system has no such sockets.
    """

    def __init__(self, model: Model) -> None:
        self.address = Address(f"\0unet-trt-{secrets.token_hex(16)}", secrets.token_bytes(KEY_BYTES))
        self._model = model
        self._listener = Listener(self.address.name, "AF_UNIX", backlog=WAITING)
        try:
            _start("door", self._welcome)
        except OSError:
            self._listener.close()
            raise

    def _welcome(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except OSError:  # they have gone away again, or this process has no descriptor to spare
                time.sleep(PAUSE_SECONDS)
                continue
            try:
                _start("visitor", self._serve, connection)
            except OSError:
                connection.close()

    def _serve(self, connection: Connection) -> None:
        # Of recv_handle: RuntimeError, where this process has no descriptor to spare.
        with contextlib.suppress(OSError, EOFError, AuthenticationError, RuntimeError), contextlib.ExitStack() as stack:
            stack.enter_context(connection)
            deliver_challenge(connection, self.address.key)
            answer_challenge(connection, self.address.key)
            given, taken = (stack.enter_context(SharedMemory(recv_handle(connection))) for _ in range(2))
            answer(connection, given, taken, self._model)


def _start(name: str, target: Callable[..., None], *arguments: object) -> None:
    """A thread; raises OSError where the system starts no more."""
    try:
        threading.Thread(target=target, args=arguments, name=name, daemon=True).start()
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, str(error)) from error


class Visit(Closing):
    """A way to a model through its door, until it is closed.

    Attributes:
        runner: stands for the model.

    Raises:
        ConnectionError, EOFError: the door's process has ended.
        OSError: it is on another machine, or this system shares no memory.
        AuthenticationError, ValueError: another key; no way to prove one, as OpenSSL is set up.
    """

    def __init__(self, address: Address, model: DistantModel) -> None:
        with contextlib.ExitStack() as stack:
            connection = stack.enter_context(Client(address.name, "AF_UNIX", authkey=address.key))
            given, taken = (stack.enter_context(SharedMemory()) for _ in range(2))
            for memory in (given, taken):
                send_handle(connection, memory.descriptor, None)
            self.runner = DistantRunner(model, connection, given, taken)
            self._held = stack.pop_all()

    def close(self) -> None:
        self._held.close()
