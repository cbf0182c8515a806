"""The queue of those who wait, as ranks change under it."""

from fastserve_jax.core.waiting import WaitingQueue
from tests.core.driver import sequence


def test_queue_follows_ranks_as_they_change():
    queue = WaitingQueue()
    seqs = [sequence(i) for i in range(5)]
    for seq, turn in zip(seqs, (3, 1, 4, 2, 5), strict=True):
        seq.rank = (1, 0, turn)
        queue.push(seq)
    seqs[4].rank = (0, 0, 9)
    queue.push(seqs[4])
    queue.discard(seqs[1])
    assert len(queue) == 4
    assert [queue.pop().id for _ in range(4)] == [4, 3, 0, 2]
    assert queue.peek() is None


def test_queue_passes_over_ranks_of_the_past():
    queue = WaitingQueue()
    seq, other = sequence(1), sequence(2)
    for rank in ((1, 0, 1), (0, 0, 2)):
        seq.rank = rank
        queue.push(seq)
    assert queue.pop() is seq
    seq.rank, other.rank = (2, 0, 3), (1, 0, 4)
    queue.push(seq)
    queue.push(other)
    assert [queue.pop().id, queue.pop().id] == [2, 1]


def test_queue_sweeps_stale_entries_out():
    queue = WaitingQueue()
    seq = sequence()
    for turn in range(10_000):
        seq.rank = (1, 0, -turn)
        queue.push(seq)
    assert len(queue._heap) < 100
    assert queue.pop() is seq
    assert queue.peek() is None
