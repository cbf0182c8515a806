"""Whose part of the service is how much too large."""

import random

import pytest

from fastserve_jax.core.fairness import Fairness
from fastserve_jax.core.types import Request, Sampling


def request(client: str = "", session: str = "") -> Request:
    return Request(1, (1,), Sampling(max_tokens=1), client=client, session=session)


HEAVY, LIGHT = request("heavy"), request("light")


def test_who_had_more_than_an_equal_part_is_in_excess_by_it():
    fairness = Fairness()
    for one in (HEAVY, HEAVY, LIGHT):
        fairness.join(one)
    for _ in range(10):
        fairness.charge(HEAVY, 0.3)
        fairness.charge(LIGHT, 0.1)
    # Four seconds in all, two for each.
    assert fairness.excess_s(HEAVY) == pytest.approx(1.0)
    assert fairness.excess_s(LIGHT) == 0.0


def test_the_excess_is_worked_off():
    fairness = Fairness()
    fairness.join(HEAVY)
    fairness.join(LIGHT)
    fairness.charge(HEAVY, 1.0)
    assert fairness.excess_s(HEAVY) == pytest.approx(0.5)
    fairness.charge(LIGHT, 1.0)
    assert fairness.excess_s(HEAVY) == pytest.approx(0.0)


def test_a_single_account_is_never_in_excess():
    fairness, rng = Fairness(), random.Random(1)
    fairness.join(HEAVY)
    for _ in range(1000):
        fairness.charge(HEAVY, rng.random())
        assert fairness.excess_s(HEAVY) == 0.0


def test_nobody_is_in_excess_of_equals():
    """However many, whatever the steps, and however little of each is charged."""
    fairness, rng = Fairness(), random.Random(2)
    clients = [request(str(i)) for i in range(7)]
    for one in clients:
        fairness.join(one)
    for _ in range(200):
        served_s = rng.random()
        for one in clients:
            fairness.charge(one, served_s)
        assert max(fairness.excess_s(one) for one in clients) < 1e-9


def test_absence_earns_nothing():
    fairness = Fairness()
    fairness.join(LIGHT)
    fairness.leave(LIGHT)
    fairness.join(HEAVY)
    fairness.charge(HEAVY, 100.0)
    fairness.join(LIGHT)
    fairness.charge(LIGHT, 1.0)
    # Had it been owed the hundred seconds, it would not be in excess now.
    assert fairness.excess_s(LIGHT) == pytest.approx(0.5)
    assert fairness.excess_s(HEAVY) == 0.0


def test_an_excess_outlives_a_short_absence():
    fairness = Fairness()
    for one in (HEAVY, LIGHT):
        fairness.join(one)
    fairness.charge(HEAVY, 10.0)
    fairness.leave(HEAVY)
    fairness.join(HEAVY)
    assert fairness.excess_s(HEAVY) == pytest.approx(5.0)
    fairness.leave(HEAVY)
    fairness.charge(LIGHT, 6.0)  # alone: all of it is virtual time
    fairness.join(HEAVY)
    assert fairness.excess_s(HEAVY) == 0.0


def test_clients_and_sessions_are_accounts_apart():
    fairness = Fairness()
    busy, other = request("a", "one"), request("a", "two")
    alone = request("b", "three")
    for one in (busy, other, alone):
        fairness.join(one)
    fairness.charge(busy, 6.0)
    assert fairness.excess_s(busy) == pytest.approx(6 - 6 / 3)  # its session, of three
    assert fairness.excess_s(other) == pytest.approx(6 - 6 / 2)  # its client, of two
    assert fairness.excess_s(alone) == 0.0


def test_a_client_and_a_session_of_one_name_are_two():
    fairness = Fairness()
    client, session = request(client="x"), request(session="x")
    for one in (client, session, LIGHT):
        fairness.join(one)
    fairness.charge(client, 1.0)
    assert fairness.excess_s(session) == 0.0


def test_who_has_no_name_has_no_account():
    fairness = Fairness()
    for one in (request(), HEAVY):
        fairness.join(one)
    fairness.charge(request(), 9.0)
    assert fairness.excess_s(request()) == 0.0
    assert fairness.excess_s(HEAVY) == 0.0
    fairness.leave(request())


def test_accounts_are_closed():
    """But for those still in excess, which others' service will close."""
    fairness = Fairness()
    fairness.join(LIGHT)
    for turn in range(20_000):
        one = request(str(turn))
        fairness.join(one)
        fairness.charge(one, 1.0)
        fairness.leave(one)
        fairness.charge(LIGHT, 0.6 if turn % 2 else 0.0)
    assert len(fairness._accounts) < 3000
    fairness.leave(LIGHT)
