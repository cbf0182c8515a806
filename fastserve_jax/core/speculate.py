"""When guessing tokens pays, for whom and how far (speculative decoding; Leviathan et al. 2023).

A guess is worth its chance of being right times what a decoded token takes now, and costs what the
cost model says a longer step does, and what steps with guesses were found to cost beyond that. To
guess, the last tokens must be known, so a plan is then not made while another is in flight: all
rows wait together, or they would fall into halves that each read all weights. So a guess must also
pay for what the device idles meanwhile. Chances come from watching texts, which costs no step.

Where there is a draft model it guesses for those of whose text less is expected. It is asked before
the step is planned, and its guesses must pay for what that takes, too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from .cost import CostModel, StepLoad
from .lookup import Lookup, Odds
from .proposal import DraftCost, DraftOdds, Proposal
from .sequence import Limits, Sequence
from .types import Ask, AskRow, Plan, Proposed

_CATCH_UP = 256  # tokens taken in for one plan, beyond those that are new
_GAIN = 0.1  # of one more step, on what is measured
_LEAST_CHANCE = 0.05
_MARGIN = 0.05  # of a plain step that guessing must win: estimates err
_MOST_SLOWER = 0.25  # of a plain step, for those who do not guess
_FORGET = 0.9995  # of what guessing was found to cost, with each plan: to be tried again
_MOST_SURPRISE = 3.0  # times longer than expected; what is more is a pause of the machine

_ROWS_A_LOOK = 16  # looking for guesses costs microseconds a row: with many, not before every plan
_HORIZON = 64  # tokens to come among which the draft model's reading of a text is shared out

# Chance that one more guess is right, one for each in turn; and whether a draft model gives it.
Offer = tuple[float, Sequence, bool]
Guesses = dict[int, tuple[int, ...]]  # by request id


class Speculation:
    """Decides by `cost` and, where there is a draft model, `draft_cost`; learns from every step."""

    def __init__(
        self, limits: Limits, cost: CostModel, draft_cost: DraftCost | None = None
    ) -> None:
        self._limits, self._cost = limits, cost
        self._draft_cost = draft_cost if limits.drafts else None
        self._odds, self._draft_odds = Odds(), DraftOdds()
        self._idle_s = 0.0  # of the device, before a plan that waited; none, where all do
        self._free_since = 0.0  # no step in flight since then
        self._waited = False
        self._pause = 0  # plans before it is worth looking again
        # By whether all rows are plain: how steps compare with the cost model where there are no
        # guesses, and what a guess adds to that.
        self._pace = [1.0, 1.0]
        self._extra_s = [0.0, 0.0]

    def waits(self, in_flight: Plan, running: Collection[Sequence], may_ask: bool) -> bool:
        """Whether tokens in flight must be known, behind guesses, or are better known than planned
        beside. `may_ask`: the draft model too, then."""
        self._waited = in_flight.guesses > 0
        room = self._limits.step_samples - len(running)
        if self._waited or room <= 0:
            return self._waited
        if self._pause:
            self._pause -= 1
        else:
            rows = [seq for seq in running if seq.pending and seq.left == 1]
            load = self._load(rows)
            for asking in (False, True) if may_ask and self._draft_cost else (False,):
                offers = self._offers(rows, room, unknown=1, asking=asking)
                _, counts = self._best(rows, offers, load, room, asking=asking)
                self._waited = self._waited or bool(counts)
            self._pause = 0 if self._waited else len(rows) // _ROWS_A_LOOK
        return self._waited

    def ask(self, rows: list[Sequence]) -> Ask | None:
        """What the draft model is to be asked for `rows`, all that run, with all tokens known."""
        room = self._limits.step_samples - len(rows)
        if self._draft_cost is None or room <= 0:
            return None
        load = self._load(rows)
        without = self._offers(rows, room, unknown=0, asking=False)
        least, _ = self._best(rows, without, load, room)
        offers = self._offers(rows, room, unknown=0, asking=True)
        won, counts = self._best(rows, offers, load, room, asking=True)
        drafted = {seq for _, seq, is_draft in offers if is_draft}
        asked = [(seq, count) for seq, count in counts.items() if seq in drafted]
        if won <= least or not asked:
            return None
        return Ask(
            tuple(
                AskRow(seq.id, seq.slot, len(seq.tokens), seq.proposal.agreed, count)
                for seq, count in asked
                if seq.proposal is not None
            )
        )

    def choose(self, rows: list[Sequence], load: StepLoad, room: int) -> Guesses:
        """What to guess for `rows`, whose tokens are all known, in a step of `load` otherwise;
        `room` bounds the tokens of all guesses."""
        offers = self._offers(rows, room, unknown=0, asking=False)
        drafted = {seq for _, seq, is_draft in offers if is_draft}
        guesses: Guesses = {}
        for seq, count in self._best(rows, offers, load, room)[1].items():
            if seq in drafted and seq.proposal is not None:
                guesses[seq.id] = seq.proposal.proposed[:count]
            elif seq.lookup is not None:
                guesses[seq.id] = seq.lookup.guess(count)
        return guesses

    def _offers(
        self, rows: list[Sequence], room: int, unknown: int, *, asking: bool
    ) -> list[Offer]:
        """Best first. Of each sequence `unknown` tokens are still to come before its guesses. Where
        `asking`, those of the draft model are what it might say, otherwise what it has said."""
        offers: list[Offer] = []
        drafted: list[tuple[float, Sequence, list[float]]] = []
        catch_up = _CATCH_UP
        most_each = min(self._limits.guesses, room, 1 + 2 * room // max(len(rows), 1))
        for seq in rows:
            lookup = seq.lookup
            if lookup is None:
                lookup = seq.lookup = Lookup(seq.tokens, seq.prompt_tokens, self._odds)
            catch_up -= lookup.follow(max(catch_up, 2))
            most = min(most_each, seq.limit - len(seq.tokens) - unknown - 1)
            if most <= 0:
                continue
            chances = lookup.chances(unknown + most)[unknown:] if lookup.expects else []
            proposed = self._proposed(seq, most, unknown, asking=asking)
            if sum(proposed) > sum(chances):
                drafted.append((proposed[0], seq, proposed))
            else:
                offers += _likely(chances, seq, False)
        drafted.sort(key=_chance, reverse=True)
        for _, seq, chances in drafted[: self._limits.drafts]:
            offers += _likely(chances, seq, True)
        offers.sort(key=_chance, reverse=True)
        return offers

    def _proposed(self, seq: Sequence, most: int, unknown: int, *, asking: bool) -> list[float]:
        """Chances of what the draft model says."""
        if self._draft_cost is None:
            return []
        proposal = seq.proposal
        if proposal is None:
            proposal = seq.proposal = Proposal(seq.tokens, self._draft_odds)
        proposal.follow()
        if asking:
            proposal.drift()
            fits = len(seq.tokens) + unknown + most <= self._limits.draft_context
            return proposal.chances(most) if fits else []
        if unknown or not proposal.is_fresh:
            return []
        return proposal.chances(min(most, len(proposal.proposed)))

    def _load(self, rows: Collection[Sequence]) -> StepLoad:
        return StepLoad(0, len(rows), sum(seq.planned + 1 for seq in rows))

    def _best(
        self,
        rows: list[Sequence],
        offers: list[Offer],
        load: StepLoad,
        room: int,
        *,
        asking: bool = False,
    ) -> tuple[float, dict[Sequence, int]]:
        """What the best guesses win, in seconds, and how many of them are whose; nobody's where
        none pay."""
        if not offers:
            return 0.0, {}
        kind = all(seq.is_plain for seq in rows)
        pace, extra_s, step_s = self._pace[kind], self._extra_s[kind], self._cost.step_s
        plain_s = pace * step_s(self._load(rows))
        token_s, without_s = plain_s / len(rows), step_s(load)
        won_s, best_s, best = 0.0, _MARGIN * plain_s, 0
        guessing: set[Sequence] = set()
        asked: dict[Sequence, int] = {}
        for count, (chance, seq, is_draft) in enumerate(offers[:room], 1):
            guessing.add(seq)
            won_s += chance * token_s
            chunks = len(guessing)
            longer = load._replace(
                prefill_tokens=load.prefill_tokens + count + chunks,
                decode_rows=load.decode_rows - chunks,
            )
            cost_s = pace * (step_s(longer) - without_s) + extra_s * count + self._idle_s
            if asking and is_draft:
                asked[seq] = asked.get(seq, 0) + 1
            cost_s += self._ask_s(asked)
            if cost_s > _MOST_SLOWER * plain_s and chunks < len(rows):
                continue
            if won_s - cost_s > best_s:
                best_s, best = won_s - cost_s, count
        counts: dict[Sequence, int] = {}
        for _, seq, _ in offers[:best]:
            counts[seq] = counts.get(seq, 0) + 1
        return (best_s if best else 0.0), counts

    def _ask_s(self, asked: dict[Sequence, int]) -> float:
        """What asking for so many tokens takes."""
        cost = self._draft_cost
        if cost is None or not asked:
            return 0.0
        runs, tokens, reading = max(asked.values()), sum(asked.values()), 0.0
        for seq, count in asked.items():
            behind = seq.proposal.lacking - 1 if seq.proposal else 0
            share = (1 + count) / min(_HORIZON, seq.limit - len(seq.tokens))
            reading += behind * min(1.0, share)
        return cost.ask_s(runs, tokens) + cost.token_s * reading

    # Learning

    def planned(self, plan: Plan, now: float) -> None:
        """`plan` is made."""
        if self._waited and len(plan.work) > len(plan.admissions):  # somebody went on
            most_s = _MOST_SURPRISE * self._cost.step_s(plan.load)
            found_s = min(now - self._free_since, most_s)
            self._idle_s += _GAIN * (found_s - self._idle_s)
        self._waited = False
        self._draft_odds.forget()
        self._idle_s *= _FORGET
        self._extra_s = [extra_s * _FORGET for extra_s in self._extra_s]

    def heard(self, proposed: Proposed, elapsed_s: float) -> None:
        """The draft model has been asked, and took so long."""
        self._free_since += elapsed_s  # it was not idle
        if self._draft_cost is not None:
            self._draft_cost.observe(proposed.runs, proposed.ran, elapsed_s)

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


def _chance(offer: tuple[float, Sequence, object]) -> float:
    return offer[0]


def _likely(chances: list[float], seq: Sequence, is_draft: bool) -> Iterable[Offer]:
    """As far as they are likely enough."""
    for chance in chances:
        if chance < _LEAST_CHANCE:
            return
        yield chance, seq, is_draft
