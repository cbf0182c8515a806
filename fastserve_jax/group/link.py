"""One connection between two hosts of a group, and whether there is still somebody at its end.

Threads of its own, because the loop may stand in a program that waits for a host that is gone.
Knows messages, not what they are about.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress

import msgspec

from .messages import Beat, Bye, Message, encode, receive

BEAT_S = 1.0
SILENCE_S = 8.0  # a host that says nothing for so long is gone


class Link:
    """`heard` is called for every message but beats, `lost` once, with the reason, if the other end
    is gone without a Bye; both on the link's thread."""

    def __init__(
        self,
        connection: socket.socket,
        name: str,
        heard: Callable[[Message], None],
        lost: Callable[[str], None],
    ) -> None:
        self.name = name
        self._connection, self._heard, self._lost = connection, heard, lost
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(SILENCE_S)
        self._sending = threading.Lock()
        self._closed = threading.Event()

    def start(self) -> None:
        for work in (self._listen, self._beat):
            threading.Thread(target=work, name=f"link {self.name}", daemon=True).start()

    def send(self, message: Message) -> None:
        self.write(encode(message))

    def write(self, data: bytes) -> None:
        """An encoded message, from any thread. A connection that does not take it is lost, which
        `lost` hears."""
        try:
            with self._sending:
                self._connection.sendall(data)
        except OSError as error:
            self._end(_reason(error))

    def close(self, last: Message | None = None) -> None:
        """What was sent arrives, the `last` word too; that the other end then closes is no loss."""
        self._closed.set()
        if last is not None:
            self.send(last)
        with suppress(OSError):  # it was gone already
            self._connection.shutdown(socket.SHUT_WR)

    def _listen(self) -> None:
        try:
            while (message := receive(self._connection)) is not None:
                if isinstance(message, Bye):
                    self._closed.set()
                if not isinstance(message, Beat):
                    self._heard(message)
            self._end("it closed the connection")
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            self._end(_reason(error))
        finally:
            with self._sending:
                self._connection.close()

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_S):
            self.send(Beat())

    def _end(self, why: str) -> None:
        if not self._closed.is_set():
            self._closed.set()
            self._lost(f"{self.name}: {why}")


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"nothing came from it for {SILENCE_S:.0f} s"
    return getattr(error, "strerror", None) or str(error)
