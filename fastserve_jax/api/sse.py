"""Server-sent events: framing one way, parsing the other. Knows nothing of what they carry."""

from __future__ import annotations

from dataclasses import dataclass

DONE = b"data: [DONE]\n\n"
MAX_EVENT_BYTES = 64 << 20  # an event longer than this is a broken or hostile server


def frame(data: bytes, event: str | None = None) -> bytes:
    """One event. `data` is JSON and so holds no line break."""
    if event is None:
        return b"data: %b\n\n" % data
    return b"event: %b\ndata: %b\n\n" % (event.encode(), data)


@dataclass(frozen=True, slots=True)
class ServerEvent:
    data: str
    event: str = "message"


class EventParser:
    """Bytes in any pieces to whole events, after the WHATWG rules (id and retry are ignored)."""

    def __init__(self) -> None:
        self._pending = bytearray()
        self._data: list[str] = []
        self._event = ""
        self._size = 0

    def push(self, piece: bytes) -> list[ServerEvent]:
        """Events completed by `piece`. Raises ValueError beyond MAX_EVENT_BYTES."""
        self._pending += piece
        *lines, rest = self._pending.split(b"\n")
        self._size += len(piece)
        if self._size > MAX_EVENT_BYTES:
            raise ValueError(f"an event is longer than {MAX_EVENT_BYTES} bytes")
        self._pending = bytearray(rest)
        events = []
        for line in lines:
            event = self._line(line.decode("utf-8", "replace").removesuffix("\r"))
            if event is not None:
                events.append(event)
                self._size = len(rest)
        return events

    def _line(self, line: str) -> ServerEvent | None:
        if not line:
            data, event = self._data, self._event or "message"
            self._data, self._event = [], ""
            return ServerEvent("\n".join(data), event) if data else None
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        return None
