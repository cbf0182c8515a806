"""Stories without end, made by rule: text of our own to try training on, and to ship a model of.

Each is drawn from its number alone, so any of them can be made again. They are plain on purpose: a
few names, a want, a hindrance, a way out and a thought at the end, told so that who and what recur
as a reader expects. What they are told with is stories.toml.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_CHOICE = re.compile(r"<([^<>]*)>")


@dataclass(frozen=True, slots=True)
class _Figure:
    name: str
    he: str
    him: str
    his: str
    what: str  # "girl", "fox"

    @property
    def He(self) -> str:
        return self.he.capitalize()


def stories(count: int, first: int = 0) -> Iterator[str]:
    """Those numbered from `first` on."""
    for number in range(first, first + count):
        yield story(number)


def story(number: int) -> str:
    chance, rules = random.Random(f"story {number}"), _rules()
    hero = _figure(chance, rules, "")
    friend = _figure(chance, rules, hero.name)
    plot = chance.choice(rules["plot"])
    own = chance.choice(plot.get("choices", [{}]))
    words = {key: _chosen(chance, text) for key, text in (rules["words"] | own).items()}
    told = (rules["begin"], plot["text"], rules["end"])
    texts = [_chosen(chance, text).strip() for text in told]
    return "\n".join(texts).format(hero=hero, friend=friend, **words)


@cache
def _rules() -> Mapping[str, Any]:
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def _chosen(chance: random.Random, text: str) -> str:
    return _CHOICE.sub(lambda found: chance.choice(found[1].split("|")), text)


def _figure(chance: random.Random, rules: Mapping[str, Any], taken: str) -> _Figure:
    kind = chance.choice(("girls", "boys", "beast_names"))
    name = chance.choice([n for n in rules[kind] if n != taken])
    is_she = kind == "girls" or (kind == "beast_names" and chance.random() < 0.5)
    what = {"girls": "girl", "boys": "boy"}.get(kind) or chance.choice(rules["beasts"])
    return _Figure(name, *(("she", "her", "her") if is_she else ("he", "him", "his")), what)
