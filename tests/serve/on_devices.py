"""python -m tests.serve.on_devices SETTINGS MODEL...: the same requests to each model, on whatever
devices SETTINGS (a JSON object) ask for; prints a line of JSON for each.

    {"sets": [...], "num_hosts": 1, "host_id": 0, "coordinator": "", "cache": FOLDER}

There are too few pages for all, so some are preempted and swapped, with steps overlapping.
"""

import asyncio
import json
import os
import random
import sys
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu"}

from fastserve_jax.assemble import Silent, place
from fastserve_jax.config import load_settings
from fastserve_jax.core.cost import CostModel
from fastserve_jax.core.policy import make_policy
from fastserve_jax.core.replicas import Replicas
from fastserve_jax.core.scheduler import Scheduler
from fastserve_jax.core.types import Request, Sampling, TokenEvent
from fastserve_jax.engine import Engine
from fastserve_jax.group.follower import Follower
from fastserve_jax.group.leader import Leader
from fastserve_jax.group.membership import Membership
from fastserve_jax.runtime.hosts import part

SETS = (
    "model.dtype=f32",
    "engine.speculate=off",
    "engine.max_slots=4",
    "engine.step_tokens=16",
    "engine.max_context=64",
    "kv.page_size=4",
    "kv.pages=18",
    "kv.host_pages=40",
)


def requests():
    rng = random.Random(0)
    for number in range(1, 13):
        prompt = tuple(rng.randrange(3, 48) for _ in range(rng.randrange(3, 24)))
        temperature = 0.0 if number % 3 else 0.8
        rules = Sampling(rng.randrange(8, 30), temperature=temperature, seed=number)
        yield Request(number, prompt, rules)


async def served(scheduler, runner):
    """Tokens by request, once each is alone in sending and all come at different times."""
    tokens = {}

    async def one(engine, request):
        await asyncio.sleep(0.002 * request.id)
        async with engine.stream(request) as events:
            own = [event.token async for event in events if isinstance(event, TokenEvent)]
        tokens[request.id] = own

    async with Engine(scheduler, runner, overlap=True) as engine:
        await asyncio.gather(*(one(engine, request) for request in requests()))
    scheduler.check()
    return [tokens[number] for number in sorted(tokens)]


def lead(placed):
    limits, division = placed.fitted.limits, placed.fitted.division
    replicas = 1 if division is None else division.replicas

    def scheduler():
        cost = CostModel(page_out_s=1e-6, page_in_s=1e-6)
        return Scheduler(limits, make_policy("mlfq", limits, cost), cost)

    made = scheduler() if replicas == 1 else Replicas([scheduler() for _ in range(replicas)])
    tokens = asyncio.run(served(made, placed.runner))
    stats = made.stats()
    return {"tokens": tokens, "preemptions": stats.preemptions, "pages_out": stats.pages_out}


def main(asked, models):
    settings = load_settings(None, [*SETS, *asked["sets"]])
    member = Membership(asked["num_hosts"], asked["host_id"], asked["coordinator"])
    for model in models:
        group = None
        if member.num_hosts > 1:
            group = Leader(member, ended, ended) if member.leads else Follower(member, ended)
        placed, _ = place(model, settings, Path(asked["cache"]), lambda _: None, Silent(), group)
        with placed.runner as runner:
            if member.leads:
                mesh = placed.fitted.division and dict(placed.fitted.division.mesh.shape)
                line = {"model": Path(model).stem, "mesh": mesh} | lead(placed)
                print(json.dumps(line), flush=True)
            else:
                group.follow(runner)
        if group is not None and member.leads:
            group.close()
    if member.num_hosts > 1:
        part()


def ended(why):
    print(why, file=sys.stderr, flush=True)
    os._exit(3)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2:])
