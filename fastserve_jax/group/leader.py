"""Host 0 of a group: takes the others in, sends them every plan, and notices if one is gone.

It watches its own device's runner: what that begins, the others are told. Knows no device.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace

import msgspec

from fastserve_jax.core.sequence import Limits
from fastserve_jax.core.types import Plan, StepResult
from fastserve_jax.errors import ConfigError, GroupLost

from .link import Link
from .membership import Membership
from .messages import (
    PROTOCOL,
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

START_S = 1800.0  # for all hosts to be there: each finds and may download the model by itself
_HELLO_S = 10.0  # from a connection to its first word


class Leader:
    """`lost` hears once why the group is at its end, `leaving` that a host was asked to stop; both
    on a thread that is not the caller's."""

    def __init__(
        self,
        membership: Membership,
        lost: Callable[[str], None],
        leaving: Callable[[str], None],
        waiting: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.membership = membership
        self._lost, self._leaving, self._waiting = lost, leaving, waiting
        self._links: dict[int, Link] = {}
        self._ready: set[int] = set()
        self._changed = threading.Condition()
        self._failure: str | None = None
        self._tally = Tally()
        self._digests: dict[int, int] = {}  # by step: ours, or what the first host said
        self._heard: dict[int, int] = {}  # by step: how many hosts agreed

    # Starting

    def agree(self, facts: Mapping[str, str], limits: Limits) -> Limits:
        """Waits for all hosts and gives them the limits that hold on each. Raises ConfigError for
        one that is not alike, GroupLost for those that do not come."""
        with ExitStack() as unless_agreed:
            met = self._met(facts, unless_agreed)
            every = [limits, *(hello.limits for _, hello in met.values())]
            limits = replace(
                limits,
                num_pages=min(of.num_pages for of in every),
                host_pages=min(of.host_pages for of in every),
            )
            for host, (connection, _) in met.items():
                try:
                    connection.sendall(encode(Welcome(limits)))
                except OSError as error:
                    raise GroupLost(f"host {host} went away again: {error}") from error
            unless_agreed.pop_all()
        self._links = {host: self._link(host, connection) for host, (connection, _) in met.items()}
        for link in self._links.values():
            link.start()
        return limits

    def _met(
        self, facts: Mapping[str, str], closing: ExitStack
    ) -> dict[int, tuple[socket.socket, Hello]]:
        """The other hosts, every one; `closing` will close their connections."""
        met: dict[int, tuple[socket.socket, Hello]] = {}
        until = time.monotonic() + START_S
        with self._listening() as listener:
            while missing := self._missing(met):
                self._waiting(f"waiting for {_hosts(missing)}")
                listener.settimeout(max(0.1, until - time.monotonic()))
                try:
                    connection, address = listener.accept()
                except TimeoutError:
                    raise GroupLost(f"{_hosts(missing)} did not come in {START_S:.0f} s") from None
                hello = _hello(connection)
                if hello is None or hello.host_id not in missing:
                    connection.close()  # not one of ours
                    continue
                closing.enter_context(connection)
                why = _differs(facts, hello)
                if why:
                    with suppress(OSError):
                        connection.sendall(encode(Refused(why)))
                    raise ConfigError(f"host {hello.host_id} at {address[0]}: {why}")
                met[hello.host_id] = connection, hello
        return met

    def _listening(self) -> socket.socket:
        """On every address there is, of both kinds where there are both."""
        _, port = self.membership.plan_address
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        backlog = self.membership.num_hosts
        try:
            return socket.create_server(
                ("", port), family=family, backlog=backlog, dualstack_ipv6=both
            )
        except OSError as error:
            raise ConfigError(
                f"cannot listen on port {port}, the one after the coordinator's: "
                f"{error.strerror or error}"
            ) from error

    def _missing(self, met: Mapping[int, object]) -> list[int]:
        return [host for host in range(1, self.membership.num_hosts) if host not in met]

    def _link(self, host: int, connection: socket.socket) -> Link:
        return Link(
            connection, f"host {host}", lambda message: self._hear(host, message), self.fail
        )

    def ready(self) -> None:
        """Waits until every host has loaded. Raises GroupLost."""
        with self._changed:
            while missing := self._missing(dict.fromkeys(self._ready)):
                if self._failure is not None:
                    raise GroupLost(self._failure)
                self._waiting(f"waiting for {_hosts(missing)} to load")
                self._changed.wait()

    # Steps

    def begins(self, plan: Plan) -> None:
        """Here; and so it does everywhere."""
        step = encode(Step(replace(plan, work=()) if plan.replicas else plan))
        for link in self._links.values():
            link.write(step)

    def ends(self, result: StepResult) -> None:
        """What came of the oldest plan that had not ended."""
        due = self._tally.add(result)
        if due is not None:
            self._compare(*due, "host 0")

    def _hear(self, host: int, message: Message) -> None:
        if isinstance(message, Ready):
            with self._changed:
                self._ready.add(host)
                self._changed.notify_all()
        elif isinstance(message, Digest):
            self._compare(message.steps, message.crc, f"host {host}")
        elif isinstance(message, Leaving):
            self._leaving(f"host {host} was asked to stop")
        else:
            self.fail(f"host {host}: it said {type(message).__name__}, which is not for a leader")

    def _compare(self, steps: int, crc: int, whose: str) -> None:
        with self._changed:
            known = self._digests.setdefault(steps, crc)
            count = self._heard[steps] = self._heard.get(steps, 0) + 1
            if count == self.membership.num_hosts:
                del self._digests[steps], self._heard[steps]
        if known != crc:
            self.fail(f"{whose} drew other tokens than the rest, by step {steps}")

    # Ending

    def close(self) -> None:
        """All is done, and the others may go."""
        for link in self._links.values():
            link.close(Bye())

    def fail(self, why: str) -> None:
        """Ends the group, for a reason that is found here or that a link tells."""
        with self._changed:
            if self._failure is not None:
                return
            self._failure = why
            self._changed.notify_all()
        for link in self._links.values():
            link.send(Bye(why))
        self._lost(why)


def _hello(connection: socket.socket) -> Hello | None:
    connection.settimeout(_HELLO_S)
    try:
        message = receive(connection)
    except (OSError, ValueError, msgspec.MsgspecError):
        return None
    return message if isinstance(message, Hello) else None


def _differs(facts: Mapping[str, str], hello: Hello) -> str:
    """What is not alike there and here, if anything."""
    if hello.protocol != PROTOCOL:
        return f"it speaks protocol {hello.protocol}, host 0 speaks {PROTOCOL}"
    names = [name for name in facts if hello.facts.get(name) != facts[name]]
    return "; ".join(f"its {n} is {hello.facts.get(n)}, host 0 has {facts[n]}" for n in names)


def _hosts(numbers: list[int]) -> str:
    named = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"host{'s' if len(numbers) > 1 else ''} {named}"
