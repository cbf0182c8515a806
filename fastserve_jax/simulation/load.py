"""Generated load from one line, seeded: `gamma:cv=4,n=2000;in=lognormal:80:1.2;out=pareto:0.9:20`.

Knows distributions; nothing of policies, devices or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator, default_rng

from ..errors import ConfigError
from .workload import MOST_TOKENS, FloatArray, IntArray, Workload

FORMS = (
    "lognormal:MEDIAN:SIGMA",
    "pareto:ALPHA:MINIMUM",
    "bimodal:SHORT:LONG:SHARE_OF_LONG",
    "fixed:TOKENS",
    "uniform:LOW:HIGH",
)
DEFAULT_IN, DEFAULT_OUT = "lognormal:80:1.2", "lognormal:200:1.1"
# Where a tail has no end of its own and the spec sets no cap behind it.
CAP_IN, CAP_OUT = 2048, 1024
DEFAULT_N, _MOST_N = 2000, 1_000_000
_MODE_SIGMA = 0.25  # of bimodal's two humps, in logarithm


def _lognormal(rng: Generator, n: int, values: tuple[float, ...]) -> FloatArray:
    median, sigma = values
    return median * np.exp(sigma * rng.standard_normal(n))


def _pareto(rng: Generator, n: int, values: tuple[float, ...]) -> FloatArray:
    alpha, minimum = values
    return minimum * (1.0 + rng.pareto(alpha, n))


def _bimodal(rng: Generator, n: int, values: tuple[float, ...]) -> FloatArray:
    short, long, share = values
    mode = np.where(rng.random(n) < share, long, short)
    return mode * np.exp(_MODE_SIGMA * rng.standard_normal(n))


def _fixed(rng: Generator, n: int, values: tuple[float, ...]) -> FloatArray:
    return np.full(n, values[0])


def _uniform(rng: Generator, n: int, values: tuple[float, ...]) -> FloatArray:
    low, high = values
    return rng.integers(int(low), int(high), n, endpoint=True).astype(np.float64)


_DRAW: dict[str, Callable[[Generator, int, tuple[float, ...]], FloatArray]] = {
    "lognormal": _lognormal,
    "pareto": _pareto,
    "bimodal": _bimodal,
    "fixed": _fixed,
    "uniform": _uniform,
}
_ENDLESS = {"lognormal": 0, "pareto": 1}  # which value must lie below the cap


@dataclass(frozen=True, slots=True)
class Lengths:
    """How many tokens prompts or outputs have."""

    family: str
    values: tuple[float, ...]
    cap: int

    def draw(self, rng: Generator, n: int) -> IntArray:
        drawn = np.minimum(_DRAW[self.family](rng, n, self.values), self.cap)
        return np.maximum(1, np.rint(drawn)).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Load:
    """A parsed spec. Gaps between arrivals are Gamma; those of coefficient 1 are Poisson's."""

    spec: str
    n: int
    rate: float | None  # arrivals a second; None: whatever rho makes of it
    cv: float
    prompt: Lengths
    output: Lengths

    def workload(self, seed: int) -> Workload:
        """The same for every policy and rho. Each part draws from a stream of its own, so that
        changing one leaves the others as they were."""
        gaps, prompts, outputs = (default_rng([seed, part]) for part in range(3))
        rate, shape = self.rate or 1.0, self.cv**-2
        arrival_s = np.cumsum(gaps.gamma(shape, 1.0 / (shape * rate), self.n))
        return Workload(
            name=self.spec,
            arrival_s=arrival_s - arrival_s[0],
            prompt_tokens=self.prompt.draw(prompts, self.n),
            output_tokens=self.output.draw(outputs, self.n),
            timed=self.rate is not None,
            cap=self.output.cap,
        )


def parse_load(spec: str) -> Load:
    """Raises ConfigError naming the part that is wrong and what could stand there."""
    text = "".join(spec.split())
    arrivals, *parts = text.split(";")
    given = {"in": DEFAULT_IN, "out": DEFAULT_OUT}
    seen: set[str] = set()
    for part in filter(None, parts):
        key, equals, value = part.partition("=")
        if key not in given or not equals or key in seen:
            raise _wrong(part, "after the arrivals stand in=LENGTHS and out=LENGTHS, each once")
        seen.add(key)
        given[key] = value
    n, rate, cv = _arrivals(arrivals)
    return Load(
        text,
        n,
        rate,
        cv,
        _lengths("in", given["in"], CAP_IN),
        _lengths("out", given["out"], CAP_OUT),
    )


def _arrivals(text: str) -> tuple[int, float | None, float]:
    kind, _, options = text.partition(":")
    if kind not in ("poisson", "gamma"):
        raise _wrong(text, "arrivals are poisson:n=N,rate=PER_SECOND or gamma:cv=CV,n=N,rate=...")
    n, rate, cv = DEFAULT_N, None, 1.0
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        number = _number(value)
        if key == "n" and number is not None and 1 <= number <= _MOST_N and number % 1 == 0:
            n = int(number)
        elif key == "rate" and number is not None and number > 0:
            rate = number
        elif key == "cv" and kind == "gamma" and number is not None and 0.05 <= number <= 20:
            cv = number
        else:
            known = f"n is a whole number of 1 to {_MOST_N:,}, rate is above 0"
            known += ", cv is 0.05 to 20" if kind == "gamma" else ""
            raise _wrong(option, known)
    return n, rate, cv


def _lengths(key: str, text: str, default_cap: int) -> Lengths:
    family, *fields = text.split(":")
    here = f"{key}={text}"
    form = next((form for form in FORMS if form.startswith(family + ":")), None)
    if form is None:
        raise _wrong(here, f"lengths are {', '.join(FORMS)}, each with :CAP behind it if wanted")
    wanted = form.count(":")
    numbers = [_number(field) for field in fields]
    if len(fields) not in (wanted, wanted + 1) or None in numbers:
        raise _wrong(here, f"write {form} or {form}:CAP, in numbers")
    given = [number for number in numbers if number is not None]
    values, cap = tuple(given[:wanted]), given[wanted] if len(given) > wanted else None
    problem = _problem(family, values, cap)
    if problem:
        raise _wrong(here, problem)
    if cap is None:
        cap = default_cap if family in _ENDLESS else MOST_TOKENS
    if family in _ENDLESS and values[_ENDLESS[family]] > cap:
        raise _wrong(here, f"half or more would be cut at {cap:g} tokens: write a larger :CAP")
    # A cap that nothing reaches would only make every client ask for more than it can get.
    reach = {"fixed": values[-1], "uniform": values[-1], "bimodal": 4 * max(values)}
    return Lengths(family, values, int(min(cap, reach.get(family, cap))))


def _problem(family: str, values: tuple[float, ...], cap: float | None) -> str:
    """What is wrong with the numbers, or nothing."""
    if cap is not None and not (1 <= cap <= MOST_TOKENS and cap % 1 == 0):
        return f"the cap is a whole number of tokens, 1 to {MOST_TOKENS:,}"
    counts = {
        "lognormal": values[:1],
        "pareto": values[1:],
        "bimodal": values[:2],
    }.get(family, values)
    if not all(1 <= count <= MOST_TOKENS for count in counts):
        return f"token counts are 1 to {MOST_TOKENS:,}"
    if family in ("fixed", "uniform") and any(count % 1 for count in counts):
        return "token counts are whole numbers"
    if family == "uniform" and values[0] > values[1]:
        return "LOW is above HIGH"
    if family == "bimodal" and not 0 <= values[2] <= 1:
        return "SHARE_OF_LONG is 0 to 1"
    if family == "lognormal" and not 0 <= values[1] <= 5:
        return "SIGMA is 0 to 5"
    if family == "pareto" and not 0.1 <= values[0] <= 100:
        return "ALPHA is 0.1 to 100"
    return ""


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _wrong(part: str, forms: str) -> ConfigError:
    return ConfigError(f"--load: cannot read {part!r}: {forms}")
