"""`fastserve serve` on the hosts of a group that do not lead; and how any of them ends with it.

A group ends as a whole: its programs need all of its devices. Whoever started it starts it again.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from fastserve_jax.assemble import place
from fastserve_jax.config import Settings
from fastserve_jax.errors import GroupLost
from fastserve_jax.group.follower import Follower
from fastserve_jax.group.membership import Membership
from fastserve_jax.runtime.hosts import part
from fastserve_jax.terminal import Bars, console

LAST_WORDS_S = 2.0  # for clients to be told


def follow_model(
    reference: str, settings: Settings, cache_dir: Path, membership: Membership
) -> int:
    """Follow host 0 until it ends. Returns the exit status; raises OperatorErrors."""
    follower = Follower(membership, end_with_group)
    asked = _Asked(follower)
    if threading.current_thread() is threading.main_thread():  # elsewhere they are somebody else's
        for kind in (signal.SIGTERM, signal.SIGINT):
            signal.signal(kind, asked)
    with all_or_none():
        with Bars() as bars:
            placed, _ = place(reference, settings, cache_dir, lambda _: None, bars, follower)
        asked.is_loaded = True
        console.print(f"host {membership.host_id} of {membership.num_hosts} follows host 0")
        with placed.runner as runner:
            follower.follow(runner)
    part()
    return 0


@contextmanager
def all_or_none() -> Iterator[None]:
    """A program that fails on one host of a group fails on all, as a rule for want of one."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        time.sleep(LAST_WORDS_S)  # who is missing is known by then, and the process at its end
        raise GroupLost(f"a step failed here: {error}") from error


class _Asked:
    """What a signal does: the group stops in order, if its leader can be asked to; once more, and
    this host ends by itself."""

    def __init__(self, follower: Follower) -> None:
        self.is_loaded = False
        self._follower = follower

    def __call__(self, kind: int, _: object) -> None:
        signal.signal(kind, signal.SIG_DFL)
        if not self.is_loaded:
            console.print("stopped while loading")
            os._exit(128 + kind)  # a compilation cannot be interrupted
        self._follower.leave()


def end_with_group(why: str, last_words: Callable[[], object] | None = None) -> None:
    """From any thread: says `why`, and ends the process soon, whatever it stands in."""
    console.print(f"the group is at its end: {why}", style="bold red", highlight=False)
    if last_words is None:
        os._exit(GroupLost.exit_status)
    timer = threading.Timer(LAST_WORDS_S, os._exit, (GroupLost.exit_status,))
    timer.daemon = True
    timer.start()
    last_words()
