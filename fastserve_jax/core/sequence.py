"""The scheduler's record of one request, and the limits that bound all of them.

Knows positions, pages and phases as numbers; decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from operator import attrgetter

from ..errors import ConfigError
from .lookup import Lookup
from .proposal import Proposal
from .types import LEGAL_MOVES, Finish, Phase, Request

_MAY_BE_NONE = ("host_pages", "guesses", "drafts", "draft_context", "encodes")

# (level, priority, what the policy orders by, turn): smaller goes first; turns are unique
Rank = tuple[int, int, float, int]


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds the scheduler. Raises ConfigError when no request could be served."""

    page_size: int = 16  # tokens
    num_pages: int = 1024
    host_pages: int = 0  # in host memory; 0: no host tier
    max_slots: int = 64  # sequences on the device, hence rows of a step
    step_tokens: int = 512  # run in one step, decodes and prompt chunks together
    max_context: int = 4096  # tokens of prompt and output of one request
    max_queue: int = 1024  # requests waiting for a slot
    max_live: int = 2048  # requests waiting, running or ending
    guesses: int = 0  # tokens that one sequence may run ahead of what is known; 0: none
    drafts: int = 0  # sequences that a draft model looks ahead for at once; 0: there is none
    draft_context: int = 0  # tokens that it may run of each
    # A prompt, but for its last token, is a source: an encoder reads it whole, in one step.
    encodes: bool = False

    def __post_init__(self) -> None:
        for limit in fields(self):
            least = 0 if limit.name in _MAY_BE_NONE else 1
            if getattr(self, limit.name) < least:
                raise ConfigError(f"{limit.name} must be at least {least}", param=limit.name)
        if self.step_tokens < self.max_slots:
            raise ConfigError(
                f"step_tokens ({self.step_tokens}) is below max_slots ({self.max_slots}): "
                "every running sequence needs room for one token in a step",
                param="step_tokens",
            )

    @property
    def step_samples(self) -> int:
        """Tokens that may be drawn in one step."""
        return max(self.max_slots, 1 + self.guesses)

    @property
    def longest_source(self) -> int:
        """What there is room for in a step, whoever else runs a token in it."""
        return self.step_tokens - self.max_slots

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)


@dataclass(slots=True, eq=False)
class Sequence:
    """One request on its way. Positions below `computed` are in memory; those up to `planned`
    are being written by steps in flight; `pending` sampled tokens are known to the device only.

    A waiting sequence owns nothing: what it had computed is kept under its digests, on the device
    or in host memory, as long as there is room.
    """

    request: Request
    tokens: list[int]  # prompt and known output
    source: int = 0  # of them, the first that are run in one step or not at all
    phase: Phase = Phase.WAITING
    rank: Rank = (0, 0, 0.0, 0)
    finish: Finish | None = None
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    sent_pages: int = 0  # of them, known to the device
    planned: int = 0
    computed: int = 0
    pending: int = 0
    in_flight: int = 0  # uncommitted plans with work of this sequence
    chain: list[bytes] = field(default_factory=list)  # digests of its full pages
    indexed_pages: int = 0  # of `pages`, offered for sharing or shared
    next_full: int = 0  # computed positions at which one more page can be shared
    is_away: bool = False  # waits for pages from host memory before it may enter
    tail: tuple[int, bytes] | None = None  # positions and name of a last page, partly full
    submitted: float = 0.0  # on the caller's clock
    queued_s: float = -1.0  # until first admitted; -1 before
    cached_tokens: int = 0  # prompt tokens found in the prefix cache then
    started: bool = False  # its StartEvent has been told
    next_scored: int = 1  # first prompt position whose log-probability is still owed
    charged: int = 0  # positions that it has had; what is computed again below is not charged
    fetched: int = 0  # positions brought from host memory since it last entered
    lookup: Lookup | None = None  # of what comes next, while it runs and is worth guessing
    proposal: Proposal | None = None  # what a draft model said last
    # derived once, read for every token
    id: int = field(init=False)
    prompt_tokens: int = field(init=False)
    limit: int = field(init=False)  # tokens of prompt and longest output
    target: int = field(init=False)  # positions that are ever run: the last token never is
    stop_ids: frozenset[int] = field(init=False)
    is_plain: bool = field(init=False)  # of each position only the best token is asked for

    def __post_init__(self) -> None:
        self.id = self.request.id
        self.prompt_tokens = len(self.request.prompt)
        self.limit = self.prompt_tokens + self.request.sampling.max_tokens
        self.target = max(self.prompt_tokens, self.limit - 1)
        rules = self.request.sampling
        self.stop_ids = rules.stop_ids
        penalised = rules.repetition_penalty != 1 or rules.presence_penalty != 0
        penalised |= rules.frequency_penalty != 0
        shaped = penalised or bool(rules.logit_bias) or rules.min_tokens > 0
        self.is_plain = not (shaped or rules.temperature > 0 or rules.logprobs is not None)

    @property
    def output_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def left(self) -> int:
        """Positions that could be planned now."""
        return min(len(self.tokens) + self.pending, self.target) - self.planned

    @property
    def entry_tokens(self) -> int:
        """Positions that must have pages before it is worth admitting."""
        return min(len(self.tokens) + 1, self.target)

    @property
    def shareable_tokens(self) -> int:
        """How many leading tokens may come from the prefix cache.

        The last known token is always run, for its logits; so is every prompt token that a
        log-probability is still owed for.
        """
        scores = self.request.sampling.prompt_logprobs is not None
        if scores and self.next_scored < self.prompt_tokens:
            return self.next_scored - 1
        return len(self.tokens) - 1

    def move(self, phase: Phase) -> None:
        assert phase in LEGAL_MOVES[self.phase], f"{self.id}: {self.phase} to {phase}"
        self.phase = phase


by_rank = attrgetter("rank")
