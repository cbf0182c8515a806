"""When guessing tokens pays, for whom and how far (speculative decoding; Leviathan et al. 2023).

A guess is worth its chance of being right times what a decoded token takes now, and costs what the
cost model says a longer step does, and what steps with guesses were found to cost beyond that. To
guess, the last tokens must be known, so a plan is then not made while another is in flight: all
rows wait together, or they would fall into halves that each read all weights. So a guess must also
pay for what the device idles meanwhile. Chances come from watching texts, which costs no step.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from .cost import CostModel, StepLoad
from .lookup import Lookup, Odds
from .sequence import Limits, Sequence
from .types import Plan

_CATCH_UP = 256  # tokens taken in for one plan, beyond those that are new
_GAIN = 0.1  # of one more step, on what is measured
_LEAST_CHANCE = 0.05
_MARGIN = 0.05  # of a plain step that guessing must win: estimates err
_MOST_SLOWER = 0.25  # of a plain step, for those who do not guess
_FORGET = 0.9995  # of what guessing was found to cost, with each plan: to be tried again
_MOST_SURPRISE = 3.0  # times longer than expected; what is more is a pause of the machine

Offer = tuple[float, Sequence]  # chance that one more guess is right; one for each in turn
Guesses = dict[int, tuple[int, ...]]  # by request id


class Speculation:
    """Decides by `cost`, and learns from every step."""

    def __init__(self, limits: Limits, cost: CostModel) -> None:
        self._limits, self._cost = limits, cost
        self._odds = Odds()
        self._idle_s = 0.0  # of the device, before a plan that waited; none, where all do
        self._free_since = 0.0  # no step in flight since then
        self._waited = False
        # By whether all rows are plain: how steps compare with the cost model where there are no
        # guesses, and what a guess adds to that.
        self._pace = [1.0, 1.0]
        self._extra_s = [0.0, 0.0]

    def waits(self, in_flight: Plan, running: Collection[Sequence]) -> bool:
        """Whether tokens in flight must be known, behind guesses, or are better known than planned
        beside."""
        self._waited = in_flight.guesses > 0
        room = self._limits.step_samples - len(running)
        if not self._waited and room > 0:
            rows = [seq for seq in running if seq.pending and seq.left == 1]
            offers = self._offers(rows, room, unknown=1)
            self._waited = bool(self._best(rows, offers, self._load(rows), room))
        return self._waited

    def choose(self, rows: list[Sequence], load: StepLoad, room: int) -> Guesses:
        """What to guess for `rows`, whose tokens are all known, in a step of `load` otherwise;
        `room` bounds the tokens of all guesses."""
        counts = self._best(rows, self._offers(rows, room, unknown=0), load, room)
        return {seq.id: seq.lookup.guess(count) for seq, count in counts.items() if seq.lookup}

    def _offers(self, rows: list[Sequence], room: int, unknown: int) -> list[Offer]:
        """Best first. Of each sequence `unknown` tokens are still to come before its guesses."""
        offers: list[Offer] = []
        catch_up = _CATCH_UP
        most_each = min(self._limits.guesses, room, 1 + 2 * room // max(len(rows), 1))
        for seq in rows:
            lookup = seq.lookup
            if lookup is None:
                lookup = seq.lookup = Lookup(seq.tokens, seq.prompt_tokens, self._odds)
            catch_up -= lookup.follow(max(catch_up, 2))
            most = min(most_each, seq.limit - len(seq.tokens) - unknown - 1)
            if most > 0 and lookup.expects:
                for chance in lookup.chances(unknown + most)[unknown:]:
                    if chance < _LEAST_CHANCE:
                        break
                    offers.append((chance, seq))
        offers.sort(key=_chance, reverse=True)
        return offers

    def _load(self, rows: Collection[Sequence]) -> StepLoad:
        return StepLoad(0, len(rows), sum(seq.planned + 1 for seq in rows))

    def _best(
        self, rows: list[Sequence], offers: list[Offer], load: StepLoad, room: int
    ) -> dict[Sequence, int]:
        """How many guesses for each make the most of the step; empty where none pay."""
        if not offers:
            return {}
        kind = all(seq.is_plain for seq in rows)
        pace, extra_s, step_s = self._pace[kind], self._extra_s[kind], self._cost.step_s
        plain_s = pace * step_s(self._load(rows))
        token_s, without_s = plain_s / len(rows), step_s(load)
        won_s, best_s, best = 0.0, _MARGIN * plain_s, 0
        guessing: set[Sequence] = set()
        for count, (chance, seq) in enumerate(offers[:room], 1):
            guessing.add(seq)
            won_s += chance * token_s
            chunks = len(guessing)
            longer = load._replace(
                prefill_tokens=load.prefill_tokens + count + chunks,
                decode_rows=load.decode_rows - chunks,
            )
            cost_s = pace * (step_s(longer) - without_s) + extra_s * count + self._idle_s
            if cost_s > _MOST_SLOWER * plain_s and chunks < len(rows):
                continue
            if won_s - cost_s > best_s:
                best_s, best = won_s - cost_s, count
        counts: dict[Sequence, int] = {}
        for _, seq in offers[:best]:
            counts[seq] = counts.get(seq, 0) + 1
        return counts

    # Learning

    def planned(self, plan: Plan, now: float) -> None:
        """`plan` is made."""
        if self._waited and len(plan.work) > len(plan.admissions):  # somebody went on
            most_s = _MOST_SURPRISE * self._cost.step_s(plan.load)
            found_s = min(now - self._free_since, most_s)
            self._idle_s += _GAIN * (found_s - self._idle_s)
        self._waited = False
        self._idle_s *= _FORGET
        self._extra_s = [extra_s * _FORGET for extra_s in self._extra_s]

    def learn(self, plan: Plan, rows: Iterable[Sequence], elapsed_s: float, now: float) -> None:
        """`plan`, with work of `rows`, took so long, and is over now."""
        self._free_since = now
        load = plan.load
        if load.pages_moved or not load.tokens:
            return
        kind = all(seq.is_plain for seq in rows)
        expected_s = self._pace[kind] * self._cost.step_s(load)
        guessing = sum(work.count for work in plan.work if work.guesses) if plan.guesses else 0
        if load.prefill_tokens != guessing:
            return  # a prompt's part says little of the rest
        if plan.guesses:  # none is worth more than a step
            found_s = min((elapsed_s - expected_s) / plan.guesses, expected_s)
            self._extra_s[kind] += _GAIN * (found_s - self._extra_s[kind])
            self._extra_s[kind] = max(0.0, self._extra_s[kind])
        else:
            ratio = min(elapsed_s / expected_s, _MOST_SURPRISE)
            self._pace[kind] *= 1.0 + _GAIN * (ratio - 1.0)


def _chance(offer: Offer) -> float:
    return offer[0]
