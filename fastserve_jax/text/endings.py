"""Which tokens end an answer: those a model names, and the well-known ends of a turn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

_ENDINGS = (
    "<|im_end|>",
    "<end_of_turn>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
)


def end_ids(named: Iterable[int | None], control: Mapping[str, int]) -> frozenset[int]:
    """`named` ids, and every well-known ending that really is a control token here."""
    found = {control[text] for text in _ENDINGS if text in control}
    return frozenset(found | {id for id in named if id is not None})
