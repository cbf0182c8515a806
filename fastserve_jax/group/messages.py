"""What hosts of a group say to each other: a length, then a message in msgpack, checked on arrival.

Never pickle: whoever reaches the port can at most send plans. A first message that is not a Hello
ends the connection.
"""

from __future__ import annotations

import socket
import struct

import msgspec

from fastserve_jax.core.sequence import Limits
from fastserve_jax.core.types import Plan

PROTOCOL = 1
MOST_BYTES = 64 << 20  # a plan that admits every slot with a whole context is smaller
_LENGTH = struct.Struct("<I")


class Hello(msgspec.Struct, tag=True, frozen=True):
    """A follower's first word. Whatever is in `facts` must be alike on all hosts."""

    host_id: int
    facts: dict[str, str]
    limits: Limits  # that it could keep
    protocol: int = PROTOCOL


class Welcome(msgspec.Struct, tag=True, frozen=True):
    limits: Limits


class Refused(msgspec.Struct, tag=True, frozen=True):
    why: str


class Ready(msgspec.Struct, tag=True, frozen=True):
    """Loaded and compiled: plans may come."""


class Step(msgspec.Struct, tag=True, frozen=True):
    plan: Plan


class Digest(msgspec.Struct, tag=True, frozen=True):
    """Of all tokens drawn in so many steps."""

    steps: int
    crc: int


class Beat(msgspec.Struct, tag=True, frozen=True):
    """I am here."""


class Leaving(msgspec.Struct, tag=True, frozen=True):
    """A follower was asked to stop, and asks its leader to."""


class Bye(msgspec.Struct, tag=True, frozen=True):
    """The leader's last word: all is done; or `why` it is not."""

    why: str = ""


type Message = Hello | Welcome | Refused | Ready | Step | Digest | Beat | Leaving | Bye

_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(
    Hello | Welcome | Refused | Ready | Step | Digest | Beat | Leaving | Bye
)


def encode(message: Message) -> bytes:
    data = _ENCODER.encode(message)
    assert len(data) <= MOST_BYTES, "no message is so large"
    return _LENGTH.pack(len(data)) + data


def receive(connection: socket.socket) -> Message | None:
    """The next one; None where the other side has closed. Raises ValueError for what is none,
    OSError (TimeoutError among them) for a connection that does not work."""
    head = _exactly(connection, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > MOST_BYTES:
        raise ValueError(f"a message of {length} bytes")
    data = _exactly(connection, length)
    return None if data is None else _DECODER.decode(data)


def _exactly(connection: socket.socket, count: int) -> bytearray | None:
    data = bytearray(count)
    view, at = memoryview(data), 0
    while at < count:
        got = connection.recv_into(view[at:])
        if not got:
            return None
        at += got
    return data
