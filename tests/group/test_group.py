"""A leader and its followers in one process, over real sockets, with runners that only count."""

import socket
import struct
import threading
import time
from contextlib import closing, contextmanager, suppress

import pytest

from fastserve_jax.core.sequence import Limits
from fastserve_jax.core.types import Plan, Sampled, StepResult, Work
from fastserve_jax.errors import ConfigError, GroupLost
from fastserve_jax.group import follower as follower_module
from fastserve_jax.group import leader as leader_module
from fastserve_jax.group import link, messages
from fastserve_jax.group.follower import Follower
from fastserve_jax.group.leader import Leader
from fastserve_jax.group.membership import Membership
from fastserve_jax.group.tokens import EVERY
from tests.ports import free_port

FACTS = {"model": "llama", "mesh": "{'model': 4}"}
LIMITS = Limits(num_pages=100, host_pages=50)


class Runner:
    """Draws the plan's step as a token, for each of its rows; `wrong` another, from there on."""

    def __init__(self, wrong=None):
        self.seen, self.wrong = [], wrong

    def begin(self, plan):
        self.seen.append(plan)
        is_wrong = self.wrong is not None and plan.step >= self.wrong
        token = plan.step + is_wrong
        return lambda: StepResult({work.request_id: Sampled(token) for work in plan.work})


class Member(threading.Thread):
    """A follower with its runner; what it raised is `error`."""

    def __init__(self, address, host, num_hosts, runner, facts=FACTS, limits=LIMITS):
        super().__init__(daemon=True)
        self.lost, self.error, self.limits = [], None, None
        self.follower = Follower(Membership(num_hosts, host, address), self.lost.append)
        self.runner, self._facts, self._own = runner, facts, limits

    def run(self):
        try:
            self.limits = self.follower.agree(self._facts, self._own)
            self.follower.ready()
            self.follower.follow(self.runner)
        except Exception as error:
            self.error = error


class Group:
    def __init__(self, followers=2):
        self.address = f"127.0.0.1:{free_port()}"
        self.num_hosts = followers + 1
        self.lost, self.leaving = [], []
        own = Membership(self.num_hosts, 0, self.address)
        self.leader = Leader(own, self.lost.append, self.leaving.append)
        self.runner, self.members = Runner(), {}

    def join(self, host, **how):
        runner = how.pop("runner", None) or Runner()
        member = self.members[host] = Member(self.address, host, self.num_hosts, runner, **how)
        member.start()
        return member

    def agreed(self):
        limits = self.leader.agree(FACTS, LIMITS)
        self.leader.ready()
        return limits

    def step(self, number):
        work = tuple(Work(i, i, number, 1, 0, (), True) for i in range(number % 3 + 1))
        plan = Plan(number, (), work)
        self.leader.begins(plan)
        self.leader.ends(self.runner.begin(plan)())
        return plan


def until(happens, seconds=10.0):
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@contextmanager
def group(**hows):
    made = Group(len(hows) or 2)
    for host in range(1, made.num_hosts):
        made.join(host, **hows.get(f"host_{host}", {}))
    yield made
    made.leader.close()
    for member in made.members.values():
        member.join(10)


def test_every_host_does_what_the_leader_does_in_its_order():
    with group() as made:
        made.agreed()
        plans = [made.step(number) for number in range(3 * EVERY)]
    for member in made.members.values():
        assert member.runner.seen == plans
        assert not member.is_alive()
        assert member.error is None
        assert not member.lost
    assert not made.lost


def test_the_limits_are_those_that_every_host_can_keep():
    with group(
        host_1={"limits": Limits(num_pages=90, host_pages=70)},
        host_2={"limits": Limits(num_pages=120, host_pages=40)},
    ) as made:
        limits = made.agreed()
    assert (limits.num_pages, limits.host_pages) == (90, 40)
    assert all(member.limits == limits for member in made.members.values())


def test_a_host_that_is_not_alike_is_refused_with_what_is_not():
    made = Group(1)
    member = made.join(1, facts=FACTS | {"model": "qwen3"})
    with pytest.raises(ConfigError, match=r"host 1 at .*127\.0\.0\.1: its model is qwen3"):
        made.leader.agree(FACTS, LIMITS)
    member.join(10)
    assert isinstance(member.error, ConfigError)
    assert "its model is qwen3" in str(member.error)


def test_hosts_that_draw_other_tokens_end_the_group():
    with group(host_1={}, host_2={"runner": Runner(wrong=EVERY + 3)}) as made:
        made.agreed()
        for number in range(EVERY):
            made.step(number)
        assert not made.lost
        for number in range(EVERY, 2 * EVERY):
            made.step(number)
        until(lambda: made.lost)
        until(lambda: all(member.lost for member in made.members.values()))
    assert made.lost == [f"host 2 drew other tokens than the rest, by step {2 * EVERY}"]
    assert all(member.lost == made.lost for member in made.members.values())


@contextmanager
def by_hand(made):
    """A connection to the leader as a follower makes it."""
    host, port = made.leader.membership.plan_address
    end = time.monotonic() + 10
    while True:
        try:
            connection = socket.create_connection((host, port))
            break
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.01)
    with closing(connection):
        yield connection


def agreeing(made):
    """The leader's agreement, in a thread; its error, if any, in a list."""
    errors = []

    def agree():
        try:
            made.agreed()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=agree, daemon=True)
    thread.start()
    return thread, errors


def test_a_host_that_dies_ends_the_group_at_once():
    made = Group(2)
    other = made.join(2)
    thread, errors = agreeing(made)
    with by_hand(made) as connection:
        connection.sendall(messages.encode(messages.Hello(1, FACTS, LIMITS)))
        assert isinstance(messages.receive(connection), messages.Welcome)
        connection.sendall(messages.encode(messages.Ready()))
        thread.join(10)
        assert not errors
        began = time.monotonic()
    until(lambda: made.lost and other.lost)
    assert time.monotonic() - began < 2
    assert made.lost == other.lost == ["host 1: it closed the connection"]


def test_a_host_that_dies_while_loading_ends_the_wait():
    made = Group(1)
    thread, errors = agreeing(made)
    with by_hand(made) as connection:
        connection.sendall(messages.encode(messages.Hello(1, FACTS, LIMITS)))
        assert isinstance(messages.receive(connection), messages.Welcome)
    thread.join(10)
    assert isinstance(errors[0], GroupLost)
    until(lambda: made.lost)
    assert made.lost == ["host 1: it closed the connection"]


def test_silence_is_noticed_though_the_connection_stands(monkeypatch):
    monkeypatch.setattr(link, "SILENCE_S", 0.5)
    monkeypatch.setattr(link, "BEAT_S", 0.1)
    made = Group(1)
    thread, _ = agreeing(made)
    with by_hand(made) as connection:
        connection.sendall(messages.encode(messages.Hello(1, FACTS, LIMITS)))
        for _ in range(8):  # as long as it says something, it is there
            connection.sendall(messages.encode(messages.Beat()))
            time.sleep(0.1)
        assert not made.lost
        until(lambda: made.lost)
    thread.join(10)
    assert made.lost == ["host 1: nothing came from it for 0 s"]


def test_a_follower_notices_a_leader_that_is_gone():
    made = Group(1)
    _, port = made.leader.membership.plan_address
    with socket.create_server(("127.0.0.1", port)) as server:
        member = made.join(1)
        connection, _ = server.accept()
        assert messages.receive(connection).host_id == 1
        connection.sendall(messages.encode(messages.Welcome(LIMITS)))
        connection.close()
    until(lambda: member.lost)
    assert member.lost == ["host 0: it closed the connection"]


def test_strangers_are_turned_away_and_the_group_forms_all_the_same(monkeypatch):
    monkeypatch.setattr(leader_module, "_HELLO_S", 0.2)
    made = Group(1)
    thread, errors = agreeing(made)
    strange = (
        b"",  # says nothing
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("<I", 1 << 31),
        struct.pack("<I", 3) + b"\x81\xa4X",
        messages.encode(messages.Ready()),
        messages.encode(messages.Hello(7, FACTS, LIMITS)),  # no such host
    )
    for data in strange:
        with by_hand(made) as connection:
            connection.sendall(data)
            with suppress(ConnectionResetError):  # where something was left unread
                assert connection.recv(100) == b""
    member = made.join(1)
    thread.join(10)
    assert not errors
    made.leader.close()
    member.join(10)
    assert member.error is None


def test_hosts_that_never_come_are_named(monkeypatch):
    monkeypatch.setattr(leader_module, "START_S", 0.3)
    monkeypatch.setattr(follower_module, "START_S", 0.3)
    made = Group(2)
    thread, errors = agreeing(made)
    thread.join(10)
    assert str(errors[0]) == "hosts 1, 2 did not come in 0 s"
    late = made.join(1)
    late.join(10)
    assert isinstance(late.error, GroupLost)
    assert "host 0 does not listen" in str(late.error)


def test_a_step_that_fails_on_a_follower_ends_it():
    with group(host_1={"runner": Broken(at=3)}) as made:
        made.agreed()
        for number in range(3):
            made.step(number)
        assert not made.lost
        made.step(3)
        made.members[1].join(10)
        assert str(made.members[1].error) == "no such device"


class Broken(Runner):
    def __init__(self, at):
        super().__init__()
        self.at = at

    def begin(self, plan):
        result = super().begin(plan)

        def failing():
            raise RuntimeError("no such device")

        return failing if plan.step == self.at else result


def test_a_follower_that_is_asked_to_stop_asks_its_leader():
    with group(host_1={}) as made:
        made.agreed()
        made.members[1].follower.leave()
        until(lambda: made.leaving)
        made.step(1)  # it goes on until the leader is done
        assert made.leaving == ["host 1 was asked to stop"]
    assert len(made.members[1].runner.seen) == 1
    assert not made.lost
