"""The encoder's loop: everybody gets its own, no step is larger than it may be, nothing is lost."""

import asyncio
import threading

import pytest

from fastserve_jax.encoding import Encodings, Text
from fastserve_jax.errors import EngineFailed, Overloaded


def text(*tokens):
    return Text(tokens, [0] * len(tokens))


class Device:
    """Sums tokens, and checks what it is asked."""

    def __init__(self, max_texts=4, step_tokens=32):
        self.max_texts, self.step_tokens = max_texts, step_tokens
        self.steps, self.gate = [], threading.Event()
        self.gate.set()

    def __call__(self, texts):
        self.gate.wait(10)
        longest = max(len(text.tokens) for text in texts)
        assert 1 <= len(texts) <= self.max_texts
        assert len(texts) == 1 or longest * len(texts) <= self.step_tokens
        self.steps.append(len(texts))
        if any(13 in text.tokens for text in texts):
            raise RuntimeError("no such device")
        return [[float(sum(text.tokens))] for text in texts]

    def loop(self, max_queue=100):
        return Encodings(
            self, max_texts=self.max_texts, step_tokens=self.step_tokens, max_queue=max_queue
        )


async def test_each_gets_its_own_in_its_order():
    device = Device()
    async with device.loop() as loop:
        asked = [[text(i, j) for j in range(i % 5 + 1)] for i in range(20, 50)]
        found = await asyncio.gather(*(loop.numbers(texts) for texts in asked))
    assert found == [[[float(sum(t.tokens))] for t in texts] for texts in asked]
    assert sum(device.steps) == sum(map(len, asked)) == loop.texts
    assert max(device.steps) == 4


async def test_a_text_too_long_for_a_step_goes_alone():
    device = Device()
    async with device.loop() as loop:
        device.gate.clear()
        first = asyncio.create_task(loop.numbers([text(1)]))
        await asyncio.sleep(0.05)
        rest = asyncio.create_task(
            loop.numbers([text(*[2] * 40), text(3), text(*[1] * 16), text(4)])
        )
        await asyncio.sleep(0)
        device.gate.set()
        await first
        assert await rest == [[80.0], [3.0], [16.0], [4.0]]
    assert device.steps == [1, 1, 2, 1]


async def test_a_full_queue_takes_none_of_them():
    device = Device()
    async with device.loop(max_queue=3) as loop:
        device.gate.clear()
        running = asyncio.create_task(loop.numbers([text(1)]))
        await asyncio.sleep(0.05)
        waiting = asyncio.create_task(loop.numbers([text(2), text(3)]))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="2 texts are waiting, and 2 more"):
            await loop.numbers([text(4), text(5)])
        assert loop.waiting == 2
        device.gate.set()
        assert await running == [[1.0]]
        assert await waiting == [[2.0], [3.0]]


async def test_who_is_gone_is_passed_over():
    device = Device()
    async with device.loop() as loop:
        device.gate.clear()
        first = asyncio.create_task(loop.numbers([text(1)]))
        await asyncio.sleep(0.05)
        gone = asyncio.create_task(loop.numbers([text(2), text(3)]))
        last = asyncio.create_task(loop.numbers([text(4)]))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        device.gate.set()
        assert await first == [[1.0]]
        assert await last == [[4.0]]
    assert device.steps == [1, 1]


async def test_a_step_that_fails_ends_it_for_all():
    device = Device()
    async with device.loop() as loop:
        device.gate.clear()
        first = asyncio.create_task(loop.numbers([text(13)]))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(loop.numbers([text(1)]))
        await asyncio.sleep(0)
        device.gate.set()
        with pytest.raises(EngineFailed, match="no such device"):
            await first
        with pytest.raises(EngineFailed):
            await second
        with pytest.raises(EngineFailed, match="must be restarted"):
            await loop.numbers([text(1)])
        assert isinstance(loop.failure, RuntimeError)


async def test_at_its_end_nobody_waits_for_ever():
    device = Device()
    async with device.loop() as loop:
        device.gate.clear()
        running = asyncio.create_task(loop.numbers([text(1)]))
        await asyncio.sleep(0.05)
        waiting = asyncio.create_task(loop.numbers([text(2)]))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.1, device.gate.set)
    with pytest.raises(EngineFailed):
        await waiting
    running.cancel()
    await asyncio.wait({running})
