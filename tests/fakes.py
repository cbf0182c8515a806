"""A device made of lists that checks what it is asked to do, and a runner for the engine on it.

    chain(-1) = 7,  chain(p) = (31 * chain(p - 1) + token(p) + 1) mod 1,000,003
    next token at position p = (chain(p - 1) + 7 * p + 13 * seed) mod vocab

So a token depends on every token before it, on its position and on the seed, and on nothing else.
A page holds the chain of each of its positions; what a step reads must be exactly the chain of the
sequence that reads it, whoever wrote it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from fastserve_jax.core.cost import QUERY_BLOCK
from fastserve_jax.core.scheduler import Limits
from fastserve_jax.core.types import (
    Admission,
    Finish,
    Plan,
    Request,
    Sampled,
    Sampling,
    Scored,
    StepResult,
    Work,
)

VOCAB = 64
_START, _MODULUS = 7, 1_000_003


def link(chain: int, token: int) -> int:
    return (31 * chain + token + 1) % _MODULUS


def next_token(chain: int, position: int, sampling: Sampling, outputs: int, vocab: int) -> int:
    token = (chain + 7 * position + 13 * sampling.seed) % vocab
    while outputs < sampling.min_tokens and token in sampling.stop_ids:
        token = (token + 1) % vocab
    return token


def alone(request: Request, vocab: int = VOCAB) -> tuple[list[int], Finish]:
    """What `request` must be answered, worked out without any device."""
    chain, sampling = _START, request.sampling
    output: list[int] = []
    for token in request.prompt:
        chain = link(chain, token)
    for position in range(len(request.prompt), len(request.prompt) + sampling.max_tokens):
        token = next_token(chain, position, sampling, len(output), vocab)
        output.append(token)
        chain = link(chain, token)
        if token in sampling.stop_ids:
            return output, Finish.STOP
    return output, Finish.LENGTH


def score(chain: int, token: int) -> float:
    """The log-probability of `token` after `chain`: any function of both will do."""
    return -(link(chain, token) % 97) / 8


@dataclass(slots=True)
class _Slot:
    admission: Admission
    tokens: list[int]  # known, and sampled since
    chains: list[int] = field(default_factory=list)  # of the first len(chains) tokens
    table: list[int] = field(default_factory=list)
    guessed_at: int = -1  # where the last work started, if it had guesses

    def begin(self, work: Work) -> None:
        """The first token of work is known: behind guesses, all before it were kept."""
        if self.guessed_at >= 0:
            assert self.guessed_at < work.start < len(self.tokens), "kept nothing, or too much"
            self.cut(work.start + 1)
        self.guessed_at = work.start if work.guesses else -1
        if work.guesses:
            assert work.count == 1 + len(work.guesses), "guesses stand behind one known token"
            assert work.samples, "guesses for nothing"
            assert work.start + 1 == len(self.tokens), "guesses for tokens that are there"
            self.tokens += work.guesses

    def cut(self, end: int) -> None:
        del self.tokens[end:], self.chains[end:]

    def chain(self, position: int) -> int:
        """The right chain at `position`, from the tokens alone; -1 gives the start."""
        while len(self.chains) <= position:
            at = len(self.chains)
            self.chains.append(link(self.chains[-1] if at else _START, self.tokens[at]))
        return self.chains[position] if position >= 0 else _START


class FakeDevice:
    """Carries out plans in the order given. With checking=False a token costs O(1).

    `nan` holds (request id, output index) of tokens to be drawn from numbers that are not finite.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        vocab: int = VOCAB,
        checking: bool = True,
        nan: Collection[tuple[int, int]] = (),
    ) -> None:
        self._limits = limits
        self._vocab = vocab
        self._checking = checking
        self._nan = nan
        self._slots: dict[int, _Slot] = {}
        self._memory: list[list[int | None]] = [
            [None] * limits.page_size for _ in range(limits.num_pages)
        ]
        self._host: list[list[int | None]] = [
            [None] * limits.page_size for _ in range(limits.host_pages)
        ]
        self.steps = 0
        self.positions_run = 0
        self.admitted: list[int] = []  # request ids, in order

    def run(self, plan: Plan) -> StepResult:
        if self._checking:
            self._check(plan)
        self.steps += 1
        self._swap(plan)
        for admission in plan.admissions:
            self._slots[admission.slot] = _Slot(admission, list(admission.tokens))
            self.admitted.append(admission.request_id)
        scored = {}
        for work in plan.work:
            slot = self._slots[work.slot]
            assert slot.admission.request_id == work.request_id, "the slot is another's"
            slot.begin(work)
            assert work.start + work.count <= len(slot.tokens), "an input is not on the device"
            self.positions_run += work.count
            if self._checking:
                self._write(slot, work)
            if slot.admission.sampling.prompt_logprobs is not None and (
                scores := tuple(self._score(slot, work))
            ):
                scored[work.request_id] = scores
        # All rows of a step run side by side: nobody reads what another writes in the same step.
        if self._checking:
            for work in plan.work:
                self._read(self._slots[work.slot], work)
        drawn = {w.request_id: self._sample(self._slots[w.slot], w) for w in plan.work if w.samples}
        sampled = {request_id: first for request_id, (first, *_) in drawn.items()}
        behind = {w.request_id: tuple(drawn[w.request_id][1:]) for w in plan.work if w.guesses}
        return StepResult(sampled, scored, behind)

    def _check(self, plan: Plan) -> None:
        limits, counts = self._limits, [work.count for work in plan.work]
        assert plan.step == self.steps, "a step is lost or twice here"
        assert plan.guesses == sum(len(work.guesses) for work in plan.work)
        drawn = sum(1 + len(work.guesses) for work in plan.work if work.samples)
        assert drawn <= limits.step_samples, "too many tokens drawn"
        assert counts or plan.swap_out or plan.swap_in, "an empty plan"
        assert all(counts), "a row of nothing"
        assert sum(counts) <= limits.step_tokens, "over the token budget"
        assert len(counts) <= limits.max_slots, "too many rows"
        assert sorted(counts, key=lambda count: count > 1) == counts, "one-token rows come first"
        slots = [work.slot for work in plan.work]
        assert len(set(slots)) == len(slots), "a slot has two rows"
        assert set(slots) <= set(range(limits.max_slots))
        keys = sum((w.start + w.count) * -(-w.count // QUERY_BLOCK) for w in plan.work)
        load = plan.load.tokens, plan.load.decode_rows, plan.load.kv_tokens
        assert load == (sum(counts), counts.count(1), keys), "mismeasured"
        working = {(work.request_id, work.slot) for work in plan.work}
        for admission in plan.admissions:
            assert (admission.request_id, admission.slot) in working, "admitted without work"

    def _swap(self, plan: Plan) -> None:
        """Out, then in; several targets of one kind must differ, for the copies may run at once."""
        assert plan.load.pages_out == len(plan.swap_out)
        assert plan.load.pages_in == len(plan.swap_in)
        for copies in (plan.swap_out, plan.swap_in):
            assert len({target for _, target in copies}) == len(copies), "a target has two sources"
        for page, host_page in plan.swap_out:
            assert min(page, host_page) >= 0
            self._host[host_page] = list(self._memory[page])
        for host_page, page in plan.swap_in:
            assert min(page, host_page) >= 0
            self._memory[page] = list(self._host[host_page])

    def _write(self, slot: _Slot, work: Work) -> None:
        size = self._limits.page_size
        assert work.first_page <= len(slot.table), "a hole in the page table"
        if work.pages:
            slot.table[work.first_page :] = work.pages
        assert work.start + work.count <= len(slot.table) * size, "a position without a page"
        for position in range(work.start, work.start + work.count):
            page, offset = divmod(position, size)
            self._memory[slot.table[page]][offset] = slot.chain(position)

    def _read(self, slot: _Slot, work: Work) -> None:
        size = self._limits.page_size
        for position in range(work.start + work.count):
            page, offset = divmod(position, size)
            found = self._memory[slot.table[page]][offset]
            assert found == slot.chain(position), (
                f"request {work.request_id} reads wrong memory at {position}, "
                f"page {slot.table[page]}"
            )

    def _score(self, slot: _Slot, work: Work) -> Iterable[Scored]:
        end = min(work.start + work.count + 1, slot.admission.prompt_tokens)
        for position in range(work.start + 1, end):
            yield Scored(position, score(slot.chain(position - 1), slot.tokens[position]), ())

    def _sample(self, slot: _Slot, work: Work) -> list[Sampled]:
        end = work.start + work.count
        assert end == len(slot.tokens), "samples before its last token"
        first = end - len(work.guesses)
        drawn = [self._draw(slot, work, position) for position in range(first, end + 1)]
        slot.cut(first)
        slot.tokens += [token for token, _ in drawn]
        return [sampled for _, sampled in drawn]

    def _draw(self, slot: _Slot, work: Work, end: int) -> tuple[int, Sampled]:
        outputs = end - slot.admission.prompt_tokens
        sampling = slot.admission.sampling
        token = next_token(slot.chain(end - 1), end, sampling, outputs, self._vocab)
        if (work.request_id, outputs) in self._nan:
            return token, Sampled(None)
        if sampling.logprobs is None:
            return token, Sampled(token)
        return token, Sampled(token, -0.5, ((token, -0.5),) * sampling.logprobs)


class FakeRunner:
    """Executes each plan when it is dispatched and tells of it later: each step takes `delay_s`,
    one after the other. The step numbered `fail_at` fails, and so do all after it."""

    def __init__(
        self, device: FakeDevice, *, delay_s: float = 0.0, fail_at: int | None = None
    ) -> None:
        self.device = device
        self._delay_s = delay_s
        self._fail_at = fail_at
        self._free_at = 0.0
        self.in_flight = 0
        self.most_in_flight = 0

    def dispatch(self, plan: Plan) -> asyncio.Future[StepResult]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[StepResult] = loop.create_future()
        outcome: StepResult | Exception
        if self._fail_at is not None and plan.step >= self._fail_at:
            outcome = RuntimeError("the device is on fire")
        else:
            outcome = self.device.run(plan)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        if self._delay_s:
            self._free_at = max(loop.time(), self._free_at) + self._delay_s
            loop.call_at(self._free_at, self._settle, future, outcome)
        else:
            loop.call_soon(self._settle, future, outcome)
        return future

    def _settle(self, future: asyncio.Future[StepResult], outcome: StepResult | Exception) -> None:
        self.in_flight -= 1
        assert not future.cancelled(), "a step in flight was abandoned"
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
