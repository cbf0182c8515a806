"""The pure core: submit, cancel and expire in; plans down; results in; events up.

No clock, I/O, arrays or randomness: time arrives as `now`. One object serves production and
simulation. One plan may be made while another is in flight; they are committed in order. Behind
guesses none is.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from itertools import takewhile

from ..errors import InvalidRequest, Overloaded
from .books import Books
from .cost import CostModel, StepLoad
from .draft import Draft
from .ordering import Policy
from .proposal import DraftCost
from .room import Room
from .sequence import Limits, Sequence
from .source import refuse_source, sequence_of
from .speculate import Speculation
from .stats import Stats
from .types import (
    Ask,
    DoneEvent,
    Event,
    Finish,
    Phase,
    Plan,
    PromptEvent,
    Proposed,
    Request,
    Sampled,
    StartEvent,
    StepResult,
    TokenEvent,
    Work,
)

__all__ = ["Limits", "Scheduler", "Stats"]

MOST_IN_FLIGHT = 2


class Scheduler:
    """`cost` is corrected by every step that is committed, and `draft_cost`, where there is a draft
    model, by everything that it is asked."""

    def __init__(
        self,
        limits: Limits,
        policy: Policy,
        cost: CostModel | None = None,
        draft_cost: DraftCost | None = None,
    ) -> None:
        self.limits = limits
        self.cost = cost or CostModel()
        self._policy = policy
        self._speculation: Speculation | None = None
        if limits.guesses:
            self._speculation = Speculation(limits, self.cost, draft_cost)
        self._books = Books(limits)
        self._room = Room(self._books, policy)
        self._books.last = self._room.last
        self._now = 0.0
        self._plans: deque[Plan] = deque()  # in flight, oldest first
        self._step = 0
        self._deadlines: list[tuple[float, int]] = []
        self._submitted = self._rejected = self._finished = self._preemptions = 0
        self._prefix_query_tokens = self._prefix_hit_tokens = 0
        self._computed_tokens = self._output_tokens = 0
        self._guessed_tokens = self._accepted_tokens = self._proposed_tokens = 0
        self._asked_s = self._asking_s = 0.0  # in all; and since the last commit
        self._busy_s = self._stall_s = 0.0
        self._pages_out = self._pages_in = 0
        self._host_hit_tokens = self._recomputed_tokens = 0

    @property
    def live(self) -> int:
        """Requests that are not over, or still have a step in flight."""
        return len(self._books.sequences)

    # Requests in

    def submit(self, request: Request, now: float) -> None:
        """Queue `request`. Raises InvalidRequest or Overloaded, and has then changed nothing."""
        try:
            self._refuse(request)
        except (InvalidRequest, Overloaded):
            self._rejected += 1
            raise
        assert request.id not in self._books.sequences, f"request {request.id} is live already"
        seq = sequence_of(request, self.limits, now)
        self._books.enter(seq)
        cached_tokens = self._books.match(seq).positions
        self._policy.join(seq, seq.prompt_tokens - cached_tokens, now)
        self._policy.wait(seq, now)
        self._books.queue(seq)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.id))
        self._submitted += 1

    def _refuse(self, request: Request) -> None:
        limits, prompt, output = self.limits, len(request.prompt), request.sampling.max_tokens
        if not prompt:
            raise InvalidRequest("the prompt is empty: give at least one token", param="prompt")
        refuse_source(request, limits)
        if prompt + output > limits.max_context:
            raise InvalidRequest(
                f"{prompt} prompt tokens and max_tokens {output} make {prompt + output}, more than "
                f"the context of {limits.max_context}: shorten the prompt or lower max_tokens",
                param="max_tokens" if prompt < limits.max_context else "prompt",
                code="context_length_exceeded",
            )
        pages = limits.pages_for(max(prompt, prompt + output - 1))
        if pages > limits.num_pages:
            raise InvalidRequest(
                f"{prompt} prompt tokens and max_tokens {output} need {pages} KV pages and there "
                f"are {limits.num_pages} of {limits.page_size} tokens: shorten the prompt, lower "
                "max_tokens, or start the server with more pages",
                param="max_tokens",
                code="context_length_exceeded",
            )
        if self._books.num_waiting >= limits.max_queue or self.live >= limits.max_live:
            raise Overloaded(
                f"{self._books.num_waiting} requests are waiting and {self.live} are live, the "
                f"limits are {limits.max_queue} and {limits.max_live}: try again later"
            )

    def cached_pages(self, chain: Iterable[bytes]) -> int:
        """How many of a prompt's full pages, by their digests, need not be computed."""
        on_device, in_host = self._books.index.find, self._books.host.find
        known = takewhile(lambda d: on_device(d) is not None or in_host(d) is not None, chain)
        return sum(1 for _ in known)

    def cancel(self, request_id: int) -> list[Event]:
        """End a request. Unknown and ended ones are ignored."""
        seq = self._books.sequences.get(request_id)
        if seq is None or seq.finish is not None:
            return []
        return [self._end(seq, Finish.CANCELLED)]

    def expire(self, now: float) -> list[Event]:
        """End every request whose deadline has been reached."""
        events: list[Event] = []
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            seq = self._books.sequences[heapq.heappop(self._deadlines)[1]]
            events.append(self._end(seq, Finish.DEADLINE))
        return events

    def next_deadline(self) -> float | None:
        """When `expire` will next have something to do."""
        while self._deadlines:
            deadline, request_id = self._deadlines[0]
            seq = self._books.sequences.get(request_id)
            if seq is not None and seq.finish is None:
                return deadline
            heapq.heappop(self._deadlines)
        return None

    # Steps

    def ask(self) -> Ask | None:
        """What to ask a draft model before the next plan, if anything. Its answer is for `hear`."""
        if self._speculation is None or self._plans or not self._may_ask():
            return None
        rows = [seq for seq in self._books.running.values() if seq.left == 1]
        return self._speculation.ask(rows) if rows else None

    def hear(self, ask: Ask, proposed: Proposed, elapsed_s: float) -> None:
        """What the draft model said, in so long. Whoever is over since hears nothing."""
        assert self._speculation is not None, "nothing was asked"
        self._speculation.heard(proposed, elapsed_s)
        self._asking_s += elapsed_s
        self._asked_s += elapsed_s
        for row in ask.rows:
            tokens = proposed.tokens.get(row.request_id, ())
            self._proposed_tokens += len(tokens)
            seq = self._books.sequences.get(row.request_id)
            if seq is not None and seq.proposal is not None:
                seq.proposal.hear(row.known, tokens, proposed.behind[row.request_id])

    def _may_ask(self) -> bool:
        """Whether nobody is there whose prompt would take the place of guesses."""
        if not self.limits.drafts or (self._books.num_waiting and self._books.free_slots):
            return False
        return all(seq.left <= 1 for seq in self._books.running.values())

    def plan(self, now: float) -> Plan | None:
        """What to run next, or None when nothing can run before another commit or submit.

        At most two plans may be uncommitted.
        """
        assert len(self._plans) < MOST_IN_FLIGHT, "commit the oldest plan first"
        self._now = now
        speculation = self._speculation
        if self._plans and speculation is not None:
            running = self._books.running.values()
            if speculation.waits(self._plans[-1], running, self._may_ask()):
                return None
            speculation = None  # for guesses all tokens must be known
        for seq in self._policy.due(now, self._books.index.disposable):
            self._books.queue(seq)
        self._books.saves = self._is_worth_a_copy()
        draft = Draft(self._books, self._room, self._policy, self.cost, now, speculation)
        plan = draft.make(self._step)
        self._preemptions += draft.preemptions
        if plan is None:
            return None
        if self._speculation is not None:
            self._speculation.planned(plan, now)
        for admission in plan.admissions:
            self._prefix_query_tokens += len(admission.tokens)
        self._prefix_hit_tokens += draft.hit_tokens
        self._host_hit_tokens += draft.host_hit_tokens
        self._pages_out += plan.load.pages_out
        self._pages_in += plan.load.pages_in
        self._step += 1
        self._plans.append(plan)
        return plan

    def commit(
        self,
        plan: Plan,
        result: StepResult,
        elapsed_s: float,
        now: float,
        load: StepLoad | None = None,
    ) -> list[Event]:
        """Book what came of the oldest plan in flight; returns what its requests must hear. `load`
        is what took so long, where the plan was not alone."""
        assert self._plans, "no plan is in flight"
        assert plan is self._plans[0], "plans are committed in order"
        self._plans.popleft()
        self._now = now
        load = load or plan.load
        stall_s = self.cost.stall_s(load)
        if self._speculation is not None:
            rows = [self._books.sequences[work.request_id] for work in plan.work]
            self._speculation.learn(plan, rows, elapsed_s, now)
        if not plan.guesses:  # or it would forget what a step without them takes
            self.cost.observe(load, elapsed_s)
        elapsed_s, self._asking_s = elapsed_s + self._asking_s, 0.0
        self._policy.step(elapsed_s, stall_s, now)
        self._busy_s += elapsed_s
        self._stall_s += stall_s
        books = self._books
        events: list[Event] = []
        for work in plan.work:
            seq = books.sequences[work.request_id]
            seq.in_flight -= 1
            if work.samples:
                seq.pending -= 1
            if seq.finish is None:
                book = self._book_guesses if work.guesses else self._book
                book(seq, work, result, elapsed_s, events)
            if not seq.in_flight and seq.slot < 0 and books.landed(seq):
                self._policy.wait(seq, now)
                books.queue(seq)
        return events

    def _book(
        self, seq: Sequence, work: Work, result: StepResult, elapsed_s: float, events: list[Event]
    ) -> None:
        end = work.start + work.count
        if not seq.started:
            seq.started = True
            events.append(StartEvent(seq.id, seq.queued_s, seq.cached_tokens))
        self._computed_tokens += work.count
        if seq.slot >= 0:  # otherwise preempted since
            assert seq.computed == work.start, f"request {seq.id}: {seq.computed}, {work.start}"
            seq.computed = end
            if work.start < seq.charged:
                self._recomputed_tokens += min(end, seq.charged) - work.start
            if end >= seq.next_full:
                self._books.share_full_pages(seq)
        if end > seq.charged:
            fresh = end - max(seq.charged, work.start)
            seq.charged = end
            self._policy.charge(seq, fresh, elapsed_s)
        if result.scored and seq.id in result.scored:
            self._score(seq, result, events)
        if work.samples:
            self._sample(seq, result.sampled[seq.id], events)
        elif seq.limit == seq.prompt_tokens == end:
            events.append(self._end(seq, Finish.LENGTH))

    def _book_guesses(
        self, seq: Sequence, work: Work, result: StepResult, elapsed_s: float, events: list[Event]
    ) -> None:
        """As if each token that counts had come of a step of its own."""
        kept = [result.sampled[seq.id]]
        for guess, after in zip(work.guesses, result.behind[seq.id], strict=True):
            if kept[-1].token != guess or guess in seq.stop_ids:
                break
            kept.append(after)
        self._computed_tokens += work.count
        self._guessed_tokens += len(work.guesses)
        self._accepted_tokens += len(kept) - 1
        assert seq.computed == work.start, f"request {seq.id}: {seq.computed}, {work.start}"
        for count, sampled in enumerate(kept, 1):
            if count == len(kept):  # the last may end it, and what it computed is worth sharing
                seq.computed = seq.planned = work.start + count
                if seq.computed >= seq.next_full:
                    self._books.share_full_pages(seq)
            if work.start + count > seq.charged:
                seq.charged = work.start + count
                self._policy.charge(seq, 1, elapsed_s / len(kept))
            self._sample(seq, sampled, events)

    def _score(self, seq: Sequence, result: StepResult, events: list[Event]) -> None:
        """Pass on what has not been told; a preempted prompt is scored again."""
        scored = tuple(s for s in result.scored[seq.id] if s.position >= seq.next_scored)
        if scored:
            assert scored[0].position == seq.next_scored, f"request {seq.id}: a score is missing"
            seq.next_scored = scored[-1].position + 1
            events.append(PromptEvent(seq.id, scored))

    def _sample(self, seq: Sequence, sampled: Sampled, events: list[Event]) -> None:
        token = sampled.token
        if token is None:
            events.append(self._end(seq, Finish.ERROR))
            return
        seq.tokens.append(token)
        self._output_tokens += 1
        events.append(TokenEvent(seq.id, token, sampled.logprob, sampled.top))
        if token in seq.stop_ids:
            events.append(self._end(seq, Finish.STOP))
        elif len(seq.tokens) == seq.limit:
            events.append(self._end(seq, Finish.LENGTH))

    def _end(self, seq: Sequence, reason: Finish) -> DoneEvent:
        self._finished += 1
        self._books.end(seq, reason)
        self._policy.finish(seq, self._now)
        return DoneEvent(seq.id, reason, seq.output_tokens)

    # Looking in

    def stats(self) -> Stats:
        books = self._books
        return Stats(
            running=len(books.running),
            waiting=books.num_waiting,
            ending=len(books.sequences) - len(books.running) - books.num_waiting,
            pages_used=self.limits.num_pages - books.index.available,
            pages_cached=books.index.idle,
            pages_total=self.limits.num_pages,
            submitted=self._submitted,
            rejected=self._rejected,
            finished=self._finished,
            preemptions=self._preemptions,
            prefix_query_tokens=self._prefix_query_tokens,
            prefix_hit_tokens=self._prefix_hit_tokens,
            computed_tokens=self._computed_tokens,
            output_tokens=self._output_tokens,
            guessed_tokens=self._guessed_tokens,
            accepted_tokens=self._accepted_tokens,
            proposed_tokens=self._proposed_tokens,
            asked_s=self._asked_s,
            steps=self._step,
            busy_s=self._busy_s,
            stall_s=self._stall_s,
            pages_out=self._pages_out,
            pages_in=self._pages_in,
            page_bytes=self.cost.page_bytes,
            host_pages_used=books.host.used,
            host_pages_total=books.host.count,
            host_hit_tokens=self._host_hit_tokens,
            recomputed_tokens=self._recomputed_tokens,
            cost_error=self.cost.error,
            levels=self._policy.levels(),
            policy=self._policy.numbers(),
        )

    def _is_worth_a_copy(self) -> bool:
        """Whether a page is copied out and in again sooner than it is computed again."""
        if not self._policy.swaps:
            return False
        cost, limits = self.cost, self.limits
        anew_s = limits.page_size * cost.token_s(limits.step_tokens)
        return cost.move_s(1, 1) < anew_s

    def check(self) -> None:
        """Raise AssertionError when the books do not balance. Reads everything: for tests."""
        self._books.check()
        in_flight: dict[int, int] = {}
        for plan in self._plans:
            for work in plan.work:
                in_flight[work.request_id] = in_flight.get(work.request_id, 0) + 1
        for seq in self._books.sequences.values():
            assert seq.in_flight == in_flight.pop(seq.id, 0), f"request {seq.id}: in flight"
            assert seq.phase is not Phase.DONE, f"request {seq.id} is done and still here"
        assert not in_flight, "somebody in flight has been forgotten"
