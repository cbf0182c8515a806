"""One host's process without Ray: how it ends, what it says then, and that it stops early."""

import asyncio
import threading

import pytest

from fastserve_jax.config import load_settings
from fastserve_jax.errors import DoesNotFit, GroupLost
from fastserve_jax.fleet import host as module
from fastserve_jax.fleet.host import End, Host
from fastserve_jax.group.membership import Membership


@pytest.fixture
def ended(monkeypatch):
    """-> what the process was ended with, once it would have been."""
    status, is_over = [], threading.Event()

    def end(number):
        status.append(number)
        is_over.set()

    def waited():
        assert is_over.wait(5)
        return status[0]

    monkeypatch.setattr(module, "LAST_WORDS_S", 0)
    monkeypatch.setattr(module.os, "_exit", end)
    return waited


def started(monkeypatch, serve):
    host = Host()
    monkeypatch.setattr(module, "_serve", serve)
    host.start("model", load_settings(), "", Membership())
    return host


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (DoesNotFit("too large"), End(2, "too large")),
        (GroupLost("host 1 is gone"), End(3, "host 1 is gone")),
        (KeyError("x"), End(1, "KeyError: 'x'")),
    ],
)
def test_it_says_why_and_ends_with_that_status(monkeypatch, ended, capfd, error, end):
    async def fails(*_):
        raise error

    host = started(monkeypatch, fails)
    assert ended() == end.status
    assert host.outlive() == end
    assert ("Traceback" in capfd.readouterr().err) == (end.status == 1), "a bug has one"


def test_asked_to_stop_before_it_runs_it_stops_when_it_does(monkeypatch, ended):
    may_run = threading.Event()

    async def serve(host, *_):
        stop = asyncio.Event()
        await asyncio.to_thread(may_run.wait, 5)
        host.running(stop.set)
        async with asyncio.timeout(5):
            await stop.wait()
        return 0

    host = started(monkeypatch, serve)
    host.stop()
    may_run.set()
    assert ended() == 0
    assert host.outlive() == End(0, "it stopped")
