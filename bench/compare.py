"""Two running OpenAI-compatible servers under the same load: ours, and a peer to hold it against.

    python bench/compare.py --ours URL [--peer URL] [--points 1,8,32] [--in 128] [--out 64]
        [--rate 0.5 2] [--prefill 512] [--rounds 5] [--json OUT]
        [--rules '{"temperature": 1, "top_k": 64, "top_p": 0.95}']
        [--ours-command CMD] [--peer-command CMD] [--exclusive]

Each point is so many clients that stream completions back to back; with `--rate` also requests that
arrive at random, so many a second; with `--prefill` one client that wants one token after a long
prompt. Requests go to one server at a time, and who is first changes from round to round: a ratio
is the median over rounds of what the two did within minutes of each other. Before each measurement
comes one request that is not counted. A server given by its command is started here: its cold start
and its processes' peak memory are told; with `--exclusive` it runs only while it is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from figures import SERVERS, Point, Row, by_point, describe, row, table
from hosting import Host, HostingError, Watch
from loadgen import LoadError, Server, arriving, closed

OPEN_S = 20.0  # of arrivals, where no number of requests is given
PREFILLS = 8  # requests of such a point


@dataclass(frozen=True)
class Side:
    name: str
    url: str
    model: str | None
    host: Host | None
    rules: dict[str, Any]

    @asynccontextmanager
    async def up(self) -> AsyncIterator[tuple[Server, Watch | None]]:
        async with AsyncExitStack() as stack:
            watch = await stack.enter_async_context(self.host.up()) if self.host else None
            server = Server(self.name, self.url, self.model, rules=self.rules)
            yield await stack.enter_async_context(server), watch

    def start_s(self) -> float | None:
        return median(self.host.starts_s) if self.host and self.host.starts_s else None


async def measure(server: Server, point: Point, turn: int, seed: int) -> Row:
    chance = random.Random(f"{seed} {turn} {point.name}")
    texts = [await server.prompt(chance, point.input) for _ in range(point.requests + 1)]
    await server.ask(texts.pop(), point.output)
    arrivals = random.Random(f"{seed} {turn}")
    began = time.perf_counter()
    if point.rate is None:
        answers = await closed(server, texts, point.output, point.clients)
    else:
        answers = await arriving(server, texts, point.output, point.rate, arrivals)
    return row(server.name, point, turn, answers, max(a.done_at for a in answers) - began)


async def rows(sides: list[Side], points: list[Point], asked: argparse.Namespace) -> list[Row]:
    found: list[Row] = []

    async def take(server: Server, watch: Watch | None, point: Point, turn: int) -> None:
        found.append(await measure(server, point, turn, asked.seed))
        print(f"round {turn}  {point.name:14} {describe(found[-1])}", flush=True)
        if watch:
            watch.look()

    if asked.exclusive:
        for turn in range(asked.rounds):
            for side in in_turn(sides, turn):
                async with side.up() as (server, watch):
                    for point in points:
                        await take(server, watch, point, turn)
        return found
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(side.up()) for side in sides]
        for turn in range(asked.rounds):
            for point in points:
                for server, watch in in_turn(servers, turn):
                    await take(server, watch, point, turn)
    return found


def in_turn[T](items: list[T], turn: int) -> list[T]:
    return items[::-1] if turn % 2 else items


def make_points(asked: argparse.Namespace) -> list[Point]:
    sizes = asked.input, asked.output
    points = [
        Point(f"{n} clients", *sizes, asked.requests or max(2 * n, 8), clients=n)
        for n in asked.points
    ]
    for rate in asked.rate:
        number = asked.requests or max(8, round(OPEN_S * rate))
        points.append(Point(f"{rate:g} a second", *sizes, number, rate=rate))
    for size in asked.prefill:
        number = asked.requests or PREFILLS
        points.append(Point(f"prefill {size}", size, 1, number, is_prefill=True))
    return points


def numbers(text: str) -> list[int]:
    found = [int(part) for part in text.split(",") if part]
    if any(number < 1 for number in found):
        raise ValueError(text)
    return found


def fields(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(text)
    return found


def read() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in SERVERS:
        parser.add_argument(f"--{name}", metavar="URL", required=name == "ours")
        parser.add_argument(f"--model-{name}", metavar="NAME", help="else the first it lists")
        parser.add_argument(f"--{name}-command", metavar="CMD", help="starts it; no shell")
    parser.add_argument("--points", type=numbers, default=[1, 8, 32], help="clients at once")
    parser.add_argument("--in", type=int, default=128, dest="input", help="tokens of a prompt")
    parser.add_argument("--out", type=int, default=64, dest="output", help="tokens of an answer")
    parser.add_argument("--rate", type=float, nargs="+", default=[], help="requests a second")
    parser.add_argument("--prefill", type=numbers, default=[], help="tokens of long prompts")
    parser.add_argument("--rules", type=fields, metavar="JSON", help="instead of temperature 0")
    parser.add_argument("--requests", type=int, help="at each point")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--exclusive", action="store_true", help="only one server up at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="OUT")
    asked = parser.parse_args()
    if asked.peer_command and not asked.peer:
        parser.error("--peer-command needs --peer, where it will answer")
    if asked.exclusive and not (asked.ours_command and (asked.peer_command or not asked.peer)):
        parser.error("--exclusive starts and stops the servers, so it needs their commands")
    counts = [asked.input, asked.output, asked.rounds, *asked.rate]
    if min(counts) <= 0 or (asked.requests is not None and asked.requests < 1):
        parser.error("sizes, rates and counts are positive")
    if not make_points(asked):
        parser.error("nothing to measure: give --points, --rate or --prefill")
    return asked


async def compare(asked: argparse.Namespace) -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    sides = []
    for name in SERVERS:
        url, command = getattr(asked, name), getattr(asked, f"{name}_command")
        if url:
            host = Host(name, url, command) if command else None
            sides.append(Side(name, url, getattr(asked, f"model_{name}"), host, asked.rules))
    points = make_points(asked)
    found = await rows(sides, points, asked)
    told = by_point(found, points)
    print(*table(told, points), sep="\n")
    starts = {side.name: side.start_s() for side in sides}
    peaks = {side.name: side.host.peak_bytes or None if side.host else None for side in sides}
    for name, start_s in starts.items():
        if start_s is not None:
            peak = peaks[name]
            size = f"{peak / 1e6:.0f} MB" if peak else "unknown"
            print(f"{name}: ready {start_s:.2f} s after its start, peak memory {size}")
    if asked.json:
        summary = {"points": told, "start_s": starts, "peak_memory_bytes": peaks}
        lines = {"rows": [asdict(row) for row in found], "summary": summary}
        asked.json.write_text(json.dumps(lines, indent=1) + "\n")


def main() -> None:
    try:
        asyncio.run(compare(read()))
    except (LoadError, HostingError) as error:
        sys.exit(f"compare: {error}")
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit("compare: interrupted")


if __name__ == "__main__":
    main()
