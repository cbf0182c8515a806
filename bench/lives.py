"""Random lives of a scheduler, by the thousand, on a device that checks every page read.

    python -m bench.lives [--lives 10000] [--first 0] [--processes N]

Life number n is the same on every machine (tests/core/lives.py). After every move the books must
balance; in the end everybody must have been answered as it would be alone, and nothing may be held.
Prints what happened in them and each life that failed; exits with 1 if one did.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor

from tests.core.lives import draw

COUNTS = (
    *("submitted", "rejected", "output_tokens", "preemptions", "pages_out", "pages_in"),
    *("prefix_hit_tokens", "host_hit_tokens", "recomputed_tokens", "steps"),
    *("guessed_tokens", "accepted_tokens"),
)
PIECE = 100


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--lives", type=int, default=10_000)
    arguments.add_argument("--first", type=int, default=0, help="number of the first one")
    arguments.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    options = arguments.parse_args()
    numbers = range(options.first, options.first + options.lives)
    pieces = [numbers[start : start + PIECE] for start in range(0, len(numbers), PIECE)]
    began, seen, failures = time.perf_counter(), Counter[str](), list[str]()
    with ProcessPoolExecutor(options.processes) as pool:
        for counts, failed in pool.map(lived, pieces):
            seen += counts
            failures += failed
    print(f"{options.lives} lives in {time.perf_counter() - began:.0f} s")
    for name in (*COUNTS, "full_hosts", "done"):
        print(f"  {name.replace('_', ' '):20}{seen[name]:12,}")
    for failure in failures[:20]:
        print(failure)
    verdict = "no invariant broke, nobody starved, nothing leaked"
    print(f"{len(failures)} FAILED" if failures else verdict)
    sys.exit(bool(failures))


def lived(numbers: Iterable[int]) -> tuple[Counter[str], list[str]]:
    """What happened in those lives, and what is to be said of each that failed."""
    seen, failures = Counter[str](), []
    for number in numbers:
        life = draw(random.Random(number))
        try:
            driver = life.live()
        except Exception as error:
            failures.append(f"life {number}, {life.policy}: {type(error).__name__}: {error}")
            continue
        stats = driver.scheduler.stats()
        seen.update({name: getattr(stats, name) for name in COUNTS})
        seen["full_hosts"] += 0 < stats.host_pages_used == stats.host_pages_total
        seen["done"] += len(driver.done)
    return seen, failures


if __name__ == "__main__":
    main()
