"""What an operator decides about the front end. Values only; nothing is read from anywhere."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServerConfig:
    host: str = "127.0.0.1"
    port: int = 8000  # 0 takes a free one
    api_keys: tuple[str, ...] = ()  # any of them opens every route but the probes; () opens all
    allowed_hosts: tuple[str, ...] = ()  # Host header names answered; () answers all
    max_body_bytes: int = 1 << 20
    max_choices: int = 128  # prompts times n of one request
    request_timeout_s: float | None = 600.0  # deadline of a request that names none
    body_timeout_s: float = 30.0  # to send a body
    send_timeout_s: float = 20.0  # one write may wait this long for a reader that does not read
    keepalive_timeout_s: float = 75.0  # an idle connection is closed after it
    drain_timeout_s: float = 30.0  # accepted work may finish for this long after SIGTERM
    max_sockets: int = 256  # WebSocket connections
    max_lanes: int = 32  # responses at once on one WebSocket
    stored_responses: int = 1024
    stored_bytes: int = 64 << 20
    stored_ttl_s: float = 3600.0
    loading: bool = False  # /models/load and /models/unload work, for all who may ask anything
    access_log: bool = False  # one line per request: ids, sizes and times, never text
