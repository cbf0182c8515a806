"""One choice of an answer: its engine events turned into text, token records and an ending.

Knows the tokenizer and the text rules; knows neither JSON nor sockets.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from fastserve_jax.api.sampling import TextRules
from fastserve_jax.core.types import (
    DoneEvent,
    Event,
    Finish,
    PromptEvent,
    Scored,
    StartEvent,
    TokenEvent,
    TopLogprobs,
)
from fastserve_jax.errors import DeadlineExceeded, EngineFailed, Overloaded
from fastserve_jax.meters import RequestMeter
from fastserve_jax.server.served import Tokenizer
from fastserve_jax.server.stops import StopMatcher


@dataclass(frozen=True, slots=True)
class TokenRecord:
    token: int
    offset: int  # characters of this choice's output before it
    logprob: float | None
    top: TopLogprobs


class Choice:
    """Feed it events; it says what text may be shown. `finish` is set by the last one."""

    def __init__(
        self, tokenizer: Tokenizer, rules: TextRules, meter: RequestMeter, *, records: bool = False
    ) -> None:
        self._stream = tokenizer.stream(rules.skip_special)
        self._rules = rules
        self._meter = meter
        self._stops = StopMatcher(rules.stops, rules.keep_stop) if rules.stops else None
        self._records: deque[TokenRecord] | None = deque() if records else None
        self._pushed = 0  # characters given to the stop matcher
        self._shown = 0  # characters let through
        self._ids_taken = 0
        self.scored: list[Scored] = []
        self.token_ids: list[int] = []
        self.cached_tokens = 0
        self.finish: str | None = None

    @property
    def output_tokens(self) -> int:
        return len(self.token_ids)

    def feed(self, event: Event) -> str:
        """Text that may be shown now.

        Raises DeadlineExceeded, EngineFailed or Overloaded when the request ended badly.
        """
        if type(event) is TokenEvent:
            return self._token(event)
        if isinstance(event, DoneEvent):
            return self._done(event)
        if isinstance(event, PromptEvent):
            self.scored.extend(event.scored)
        elif isinstance(event, StartEvent):
            self.cached_tokens = event.cached_tokens
            self._meter.start(event.queued_s)
        return ""

    def _token(self, event: TokenEvent) -> str:
        token = event.token
        self.token_ids.append(token)
        self._meter.token()
        if token in self._rules.end_ids and not self._rules.keep_stop:
            return ""
        text = self._stream.push(token)
        if self._records is not None:
            self._records.append(TokenRecord(token, self._pushed, event.logprob, event.top))
        return self._show(text)

    def _show(self, text: str) -> str:
        self._pushed += len(text)
        if self._stops is not None:
            text = self._stops.push(text)
            if self._stops.matched:
                self._end("stop")
        self._shown += len(text)
        return text

    def _done(self, event: DoneEvent) -> str:
        if event.reason is Finish.DEADLINE:
            self._meter.done("deadline", self.output_tokens)
            raise DeadlineExceeded("the request's deadline passed before it was finished")
        if event.reason is Finish.ERROR:
            self._meter.done("error", self.output_tokens)
            raise EngineFailed("the model's numbers were not finite for this request")
        if event.reason is Finish.CANCELLED:
            raise Overloaded("the server stopped this request before it was finished")
        text = self._show(self._stream.flush())
        if self.finish is None:
            if self._stops is not None:
                rest = self._stops.flush()
                self._shown += len(rest)
                text += rest
            self._end(event.reason.value)
        return text

    def _end(self, reason: str) -> None:
        self.finish = reason
        self._meter.done(reason, self.output_tokens)

    def take_ids(self) -> list[int]:
        """Ids of the tokens drawn since the last call, the stopping one among them."""
        taken = self.token_ids[self._ids_taken :]
        self._ids_taken = len(self.token_ids)
        return taken

    def close(self) -> None:
        """The answer is over, whether or not this choice had ended."""
        self._meter.close()

    def take_records(self) -> list[TokenRecord]:
        """Records of the tokens whose text was shown since the last call.

        A token whose text begins behind a stop string's cut is never among them.
        """
        records = self._records
        if not records:
            return []
        everything = self._shown == self._pushed
        taken = []
        while records and (everything or records[0].offset < self._shown):
            taken.append(records.popleft())
        return taken
