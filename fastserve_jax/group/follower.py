"""Any other host of a group: does what host 0 does, in the same order, until it says goodbye.

Knows no device and no HTTP.
"""

from __future__ import annotations

import queue
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Protocol

import msgspec

from fastserve_jax.core.sequence import Limits
from fastserve_jax.core.types import Plan, StepResult
from fastserve_jax.errors import ConfigError, GroupLost

from .leader import START_S
from .link import SILENCE_S, Link
from .membership import Membership
from .messages import (
    Bye,
    Digest,
    Hello,
    Leaving,
    Message,
    Ready,
    Refused,
    Step,
    Welcome,
    encode,
    receive,
)
from .tokens import Tally

_RETRY_S = 0.5


class Runner(Protocol):
    def begin(self, plan: Plan) -> Callable[[], StepResult]:
        """Dispatches; what it returns waits."""


class Follower:
    """`lost` hears why the group is at its end, on a thread that is not the caller's."""

    def __init__(self, membership: Membership, lost: Callable[[str], None]) -> None:
        self.membership = membership
        self._lost = lost
        self._link: Link | None = None
        self._tally = Tally()
        self._messages: queue.SimpleQueue[Message | Exception] = queue.SimpleQueue()

    def agree(self, facts: Mapping[str, str], limits: Limits) -> Limits:
        """What the leader says. Raises ConfigError if it refuses, GroupLost if it is not there."""
        connection = self._connected()
        with ExitStack() as unless_agreed:
            unless_agreed.enter_context(connection)
            hello = Hello(self.membership.host_id, dict(facts), limits)
            try:
                connection.sendall(encode(hello))
                connection.settimeout(START_S)  # it waits for the others, too
                answer = receive(connection)
            except (OSError, ValueError, msgspec.MsgspecError) as error:
                raise GroupLost(f"host 0 went away before it took this one in: {error}") from error
            if isinstance(answer, Refused):
                raise ConfigError(f"host 0 refuses: {answer.why}")
            if not isinstance(answer, Welcome):
                raise GroupLost("host 0 went away before it took this one in")
            unless_agreed.pop_all()
        self._link = Link(connection, "host 0", self._hear, self._lost)
        self._link.start()
        return answer.limits

    def _connected(self) -> socket.socket:
        host, port = self.membership.plan_address
        until = time.monotonic() + START_S
        while True:
            try:
                return socket.create_connection((host, port), timeout=SILENCE_S)
            except OSError as error:
                if time.monotonic() > until:
                    raise GroupLost(f"host 0 does not listen at {host}:{port}: {error}") from error
                time.sleep(_RETRY_S)

    def _hear(self, message: Message) -> None:
        if isinstance(message, Bye) and message.why:
            self._lost(message.why)
        self._messages.put(message)

    def ready(self) -> None:
        assert self._link is not None, "agree first"
        self._link.send(Ready())

    def leave(self) -> None:
        """Asks the leader to come to an end."""
        if self._link is not None:
            self._link.send(Leaving())

    def follow(self, runner: Runner) -> None:
        """Carries out plans until there will be no more; as on the leader, one is begun while the
        one before it runs. Raises what a step raises."""
        assert self._link is not None, "agree first"
        with ThreadPoolExecutor(1, thread_name_prefix="ends") as waiter:
            while isinstance(message := self._messages.get(), Step):
                waiter.submit(self._end, runner.begin(message.plan))
        if isinstance(message, Exception):
            raise message
        self._link.close()

    def _end(self, result: Callable[[], StepResult]) -> None:
        assert self._link is not None, "agree first"
        try:
            due = self._tally.add(result())
        except Exception as error:
            self._messages.put(error)
        else:
            if due is not None:
                self._link.send(Digest(*due))
