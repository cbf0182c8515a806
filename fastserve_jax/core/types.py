"""The words every floor shares: requests in, plans down, results and events up.

Stdlib only. Times are seconds on the caller's clock; tokens, pages and slots are ints.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import dataclass_transform

from .cost import StepLoad

MAX_TOP_LOGPROBS = 20  # alternatives reported per position, OpenAI's bound


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one request's tokens are drawn. Checked where it is parsed, not here."""

    max_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0  # uint32; a token's key is fold_in(seed, position)
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0  # stop_ids are forbidden before that many
    stop_ids: frozenset[int] = frozenset()  # ends the request; the caller adds the model's EOS
    logprobs: int | None = None  # alternatives per output token; None: no logprobs at all
    prompt_logprobs: int | None = None  # the same for prompt tokens


@dataclass(frozen=True, slots=True)
class Adapter:
    """What a model was taught beside its weights, as it lies on the device. What a sequence
    computes hangs on it, so nothing is shared across `serial`s."""

    index: int  # from 1: its place there, which another may have later
    serial: int  # of all that were ever loaded: no two have the same


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asked, as the scheduler sees it."""

    id: int  # unique while the engine lives
    prompt: tuple[int, ...]
    sampling: Sampling
    priority: int = 0  # lower goes first, within what the policy grants
    deadline: float | None = None  # on the engine's clock; reaching it ends the request
    cache_salt: str = ""  # prefixes are shared only between equal salts
    client: str = ""  # whose requests share one fair part of the service; "": nobody's
    session: str = ""  # requests of one conversation or agent, whose service counts together
    adapter: Adapter | None = None  # None: the model as it is


class Phase(enum.Enum):
    WAITING = "waiting"  # owns no slot and no pages
    RUNNING = "running"  # owns a slot and pages on the device
    ENDING = "ending"  # finished or cancelled, with a step still in flight
    DONE = "done"


LEGAL_MOVES: Mapping[Phase, frozenset[Phase]] = {
    Phase.WAITING: frozenset({Phase.RUNNING, Phase.DONE, Phase.ENDING}),
    Phase.RUNNING: frozenset({Phase.WAITING, Phase.ENDING, Phase.DONE}),
    Phase.ENDING: frozenset({Phase.DONE}),
    Phase.DONE: frozenset(),
}


@dataclass(frozen=True, slots=True)
class Admission:
    """A sequence takes a slot: the device learns its tokens and how it is sampled."""

    request_id: int
    slot: int
    tokens: tuple[int, ...]  # prompt, and after a preemption what it had already produced
    prompt_tokens: int  # how many of them are the prompt
    sampling: Sampling
    adapter: int = 0  # its index; 0: none


@dataclass_transform(frozen_default=True)
def _hot[T](cls: type[T]) -> type[T]:
    """Frozen for the type checker only: at run time that would cost four times as much to make,
    and these are made for every token."""
    return dataclass(slots=True, unsafe_hash=True)(cls)


@_hot
class Work:
    """Run `count` tokens of one sequence from position `start`.

    The tokens themselves are on the device already: the admission brought the known ones, and
    every sampled token was written behind them. `pages` are the slot's new pages, to stand at
    `first_page` and after in its page table; earlier entries are unchanged.

    The last tokens may be `guesses`, brought with the work: then a token is drawn before each of
    them too, and those drawn behind the first wrong guess mean nothing.
    """

    request_id: int
    slot: int
    start: int
    count: int
    first_page: int
    pages: tuple[int, ...]
    samples: bool  # the last of these tokens is followed by a new one
    guesses: tuple[int, ...] = ()


_NO_LOAD = StepLoad()
Copies = tuple[tuple[int, int], ...]  # (source page, target page), targets all different


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything the device must do for one step, in order: swaps out, swaps in, admissions, work.

    Plans take effect in the order they are made, so a page that one plan gives up may be written
    by the same plan's later parts: what was in flight before has read it by then.
    """

    step: int
    admissions: tuple[Admission, ...]
    work: tuple[Work, ...]  # single-token rows first
    swap_out: Copies = ()  # device page, host page
    swap_in: Copies = ()  # host page, device page
    load: StepLoad = _NO_LOAD  # what it weighs, for the cost model
    guesses: int = 0  # in all its work
    # Where there are several replicas, what each does. `work` is then that of all together, `load`
    # such that none has more of anything, and the rest is theirs alone.
    replicas: tuple[Plan, ...] = ()


@dataclass(frozen=True, slots=True)
class AskRow:
    """Wants `count` tokens that may come behind the first `known`, all of which are known and on
    the device. The draft model's own tokens before hold for the first `agreed` of these."""

    request_id: int
    slot: int
    known: int
    agreed: int
    count: int


@dataclass(frozen=True, slots=True)
class Ask:
    """What a draft model is to do while no plan is in flight."""

    rows: tuple[AskRow, ...]


@dataclass(frozen=True, slots=True)
class Proposed:
    """What came of an ask, by request id: who is still being caught up with gets no tokens."""

    tokens: Mapping[int, tuple[int, ...]]
    behind: Mapping[int, int]  # known tokens that the draft model has yet to run
    runs: int  # of its programs
    ran: int  # tokens in them


TopLogprobs = tuple[tuple[int, float], ...]  # (token, logprob), best first


@_hot
class Sampled:
    """One drawn token. `token` is None when the logits were not finite."""

    token: int | None
    logprob: float | None = None
    top: TopLogprobs = ()


@dataclass(frozen=True, slots=True)
class Scored:
    """Log-probability of one given prompt token, at `position` of the prompt."""

    position: int
    logprob: float
    top: TopLogprobs


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came of a plan, by request id."""

    sampled: Mapping[int, Sampled]  # the first, where there were guesses
    scored: Mapping[int, tuple[Scored, ...]] = field(default_factory=dict)
    behind: Mapping[int, tuple[Sampled, ...]] = field(default_factory=dict)  # after each guess


class Finish(enum.Enum):
    STOP = "stop"  # a stop id was drawn
    LENGTH = "length"  # max_tokens
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"  # the model's numbers were not finite


@dataclass(frozen=True, slots=True)
class StartEvent:
    """The first step with this request is over; comes before its other events, and once."""

    request_id: int
    queued_s: float  # from submission to the plan that admitted it
    cached_tokens: int  # prompt tokens that the prefix cache gave


@dataclass(frozen=True, slots=True)
class PromptEvent:
    """Log-probabilities for a stretch of the prompt; the first token has none."""

    request_id: int
    scored: tuple[Scored, ...]


@_hot
class TokenEvent:
    """A stop id that ends the request is reported too, before its DoneEvent."""

    request_id: int
    token: int
    logprob: float | None = None
    top: TopLogprobs = ()


@dataclass(frozen=True, slots=True)
class DoneEvent:
    request_id: int
    reason: Finish
    output_tokens: int


Event = StartEvent | PromptEvent | TokenEvent | DoneEvent
