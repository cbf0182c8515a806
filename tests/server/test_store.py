from __future__ import annotations

from fastserve_jax.server.store import ResponseStore


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make(count: int = 3, size: int = 10_000, ttl_s: float = 60.0) -> tuple[ResponseStore, Clock]:
    clock = Clock()
    return ResponseStore(count, size, ttl_s, clock), clock


TURNS = [{"role": "user", "content": "hi"}]


def test_the_oldest_make_room():
    store, _ = make(count=3)
    for i in range(10):
        store.put(str(i), b"x", TURNS, "me")
    assert [i for i in range(10) if store.get(str(i), "me")] == [7, 8, 9]


def test_bytes_are_bounded_too():
    store, _ = make(count=100, size=1000)
    for i in range(10):
        store.put(str(i), b"x" * 400, TURNS, "me")
    assert len(store) == 2
    store.put("huge", b"x" * 2000, TURNS, "me")
    assert store.get("huge", "me") is None


def test_age_ends_an_entry():
    store, clock = make(ttl_s=60)
    store.put("a", b"x", TURNS, "me")
    clock.now = 59.9
    assert store.get("a", "me") is not None
    clock.now = 60.0
    assert store.get("a", "me") is None
    assert len(store) == 0


def test_only_the_owner_sees_it():
    store, _ = make()
    store.put("a", b"x", TURNS, "me")
    assert store.get("a", "you") is None
    assert store.get("a", "me").turns == tuple(TURNS)
