"""The default policy's promises, kept in virtual time. Numbers are of one fixed workload each, and
bounds are loose: what is tuned by simulation must not turn these red, a broken rule must."""

import random
from dataclasses import replace

from fastserve_jax.core.adaptive import Adaptive, Tuning
from fastserve_jax.core.cost import CostModel, StepLoad
from fastserve_jax.core.ordering import FirstComeFirstServed, Policy
from fastserve_jax.core.scheduler import Limits, Scheduler
from fastserve_jax.core.simulate import STOP, Life, Run, simulate
from fastserve_jax.core.types import Request, Sampling
from tests.core.driver import sequence

DEVICE = CostModel([0.010], (1,), prefill_token_s=4e-5, decode_row_s=1e-4)
EIGHT = Limits(num_pages=4000, max_slots=8, step_tokens=256, max_live=10**6, max_queue=10**6)


class Work:
    """Requests to come, each known by what it is called."""

    def __init__(self, seed: int = 1) -> None:
        self.rng = random.Random(seed)
        self.arrivals: list[tuple[float, Request]] = []
        self.lengths: dict[int, int] = {}
        self.names: dict[str, list[int]] = {}

    def add(
        self, name: str, at: float, prompt: int, output: int, *, most: int = 2000, **fields
    ) -> None:
        request_id = len(self.lengths) + 1
        tokens = tuple(self.rng.randrange(30_000) for _ in range(prompt))
        sampling = Sampling(most, stop_ids=frozenset([STOP]))
        self.arrivals.append((at, Request(request_id, tokens, sampling, **fields)))
        self.lengths[request_id] = output
        self.names.setdefault(name, []).append(request_id)

    def run(
        self,
        policy: type[Policy] | None = None,
        limits: Limits = EIGHT,
        device: CostModel = DEVICE,
        tuning: Tuning | None = None,
        **options,
    ) -> Run:
        cost = device.copy()
        made = policy() if policy else Adaptive(limits, cost, tuning=tuning)
        scheduler = Scheduler(limits, made, cost)
        return simulate(scheduler, self.arrivals, self.lengths, device, **options)

    def lives(self, run: Run, name: str) -> list[Life]:
        return [life for life in run.lives if life.request_id in self.names[name]]

    def jct_s(self, run: Run, name: str) -> float:
        """From arrival to the last token, on average."""
        lives = self.lives(run, name)
        assert min(life.done_s for life in lives) >= 0
        return sum(life.done_s - life.arrival_s for life in lives) / len(lives)


# Shortest expected work first


def two_kinds(work: Work, count: int, at: float, every: float, name: str) -> None:
    """Short prompts lead to long outputs and long prompts to short ones, in turn."""
    for turn in range(count):
        if turn % 2:
            work.add(f"{name} short", at + turn * every, 120, work.rng.randint(6, 10))
        else:
            work.add(f"{name} long", at + turn * every, 20, work.rng.randint(200, 300))


def test_what_is_expected_to_be_short_goes_first_once_it_has_learned():
    work = Work()
    two_kinds(work, 400, 0.0, 0.25, "known")
    two_kinds(work, 60, 200.0, 0.0, "new")
    run, fcfs = work.run(), work.run(FirstComeFirstServed)
    assert work.jct_s(run, "new short") < 0.25 * work.jct_s(fcfs, "new short")
    assert work.jct_s(run, "new long") < 1.3 * work.jct_s(fcfs, "new long")
    short, long = (
        max(life.done_s for life in work.lives(run, f"new {kind}")) for kind in ("short", "long")
    )
    assert short - 200 < 0.3 * (long - 200)


def test_what_has_outlived_its_kind_lets_newcomers_pass():
    """Nothing tells them apart at first: half end soon, half run on."""
    work = Work()
    for turn in range(500):
        work.add("known", 0.2 * turn, 50, 5 if turn % 2 else 300)
    for _ in range(20):
        work.add("long", 200.0, 50, 300)
    for _ in range(20):
        work.add("short", 203.0, 50, 5)
    run, fcfs = work.run(), work.run(FirstComeFirstServed)
    assert run.stats.preemptions > 0
    assert work.jct_s(run, "short") < 0.4 * work.jct_s(fcfs, "short")


# First tokens


def test_those_who_are_not_over_count_for_what_is_expected_of_newcomers():
    """Eight long ones have made 800 tokens each and 160 short ones ten. A hundred newcomers of the
    same kind are then expected to take what all took so far on average, 48 tokens, or more."""
    work = Work()
    for _ in range(8):
        work.add("long", 0.0, 50, 1990)
    for turn in range(160):
        work.add("short", 0.05 * turn, 50, 10)
    for _ in range(100):
        work.add("new", 10.0, 50, 10)
    run = work.run(limits=replace(EIGHT, max_slots=16), sample_every_s=0.05)
    seen = next(sample for sample in run.samples if sample.time_s > 10.0)
    assert seen.running + seen.waiting == 108
    step_s = DEVICE.step_s(StepLoad(decode_rows=8))
    assert seen.policy["backlog_seconds"] > (100 * 48 + 8 * 200) * step_s / 16


def test_a_newcomer_has_its_first_token_soon_though_all_slots_are_taken():
    work = Work()
    for _ in range(8):
        work.add("long", 0.0, 20, 400)
    work.add("new", 1.0, 20, 400)
    run, fcfs = work.run(), work.run(FirstComeFirstServed)
    first_s = [work.lives(r, "new")[0].first_token_s - 1.0 for r in (run, fcfs)]
    assert first_s[0] < 0.1
    assert first_s[1] > 2.0


def test_slices_take_a_bounded_part_of_the_slots():
    work = Work()
    for turn in range(8 + 6):
        work.add("all", 0.0 if turn < 8 else 1.0, 200, 300)
    run = work.run(sample_every_s=1e-4)
    slices = [sample.levels[0] for sample in run.samples]
    assert max(slices) == int(Tuning().slice_share * 8) > 0
    before = [life.first_token_s - 1.0 for life in run.lives[8:]]
    assert sorted(before) == before  # one after the other, in order
    assert max(before) < 0.5


# Nobody waits for ever


def overtaken() -> Work:
    """A long request in a stream of short ones that fills all slots."""
    work = Work()
    for turn in range(300):
        work.add("known", 0.1 * turn, 200 if turn % 2 else 20, 8 if turn % 2 else 250)
    for _ in range(8):
        work.add("before", 149.95, 200, 12)
    work.add("long", 150.0, 20, 250)
    for turn in range(800):
        work.add("short", 150.0 + turn / 100, 200, work.rng.randint(6, 10))
    return work


def test_who_is_late_is_promoted():
    work, device = overtaken(), replace(DEVICE, prefill_token_s=0.0)
    never = replace(Tuning(), aging=0.0, late_share=0.0, patience=1e9)
    fcfs_s = work.jct_s(work.run(FirstComeFirstServed, device=device), "long")
    never_s = work.jct_s(work.run(device=device, tuning=never), "long")
    jct_s = work.jct_s(work.run(device=device), "long")
    assert never_s > 4 * fcfs_s
    assert jct_s < 2.5 * fcfs_s


def test_a_long_prompt_that_runs_yields_no_longer_than_it_would_have_waited():
    """It has begun beside one before it; then short ones come without end, enough for all steps."""
    work, device = Work(), replace(DEVICE, prefill_token_s=1e-3)
    for turn in range(100):
        work.add("known", 2.0 * turn, 100, 3)
    work.add("before", 300.0, 100, 3)
    work.add("long", 300.0, 2000, 3)
    for turn in range(100):
        work.add("short", 300.05 + 0.13 * turn, 120, 3)
    run, fcfs = (work.run(policy, device=device) for policy in (None, FirstComeFirstServed))
    ours_s, fcfs_s = (work.lives(r, "long")[0].first_token_s - 300.0 for r in (run, fcfs))
    assert ours_s < 1.2 * fcfs_s


def test_a_deadline_that_can_be_met_is_met():
    work = Work()
    for turn in range(600):
        work.add("known", 0.1 * turn, 200 if turn % 2 else 20, 8 if turn % 2 else 250)
    for _ in range(30):
        work.add("before", 149.95, 20, 250)
    for name, deadline in (("free", None), ("bound", 156.0), ("lost", 150.5)):
        work.add(name, 150.0, 20, 250, deadline=deadline)
    run = work.run()
    free_s, bound_s, lost_s = (150 + work.jct_s(run, name) for name in ("free", "bound", "lost"))
    assert bound_s < 156.0 < free_s
    assert lost_s > 156.0  # it could not be met, so nobody is held up for it


def test_priorities_order_what_stands_at_one_level():
    policy = Adaptive(EIGHT, DEVICE.copy())
    seqs = [sequence(1), sequence(2, priority=1), sequence(3, priority=-1, prompt_tokens=500)]
    for seq in seqs:
        policy.join(seq, seq.prompt_tokens, 0.0)
        policy.wait(seq, 0.0)
    assert seqs[2].rank < seqs[0].rank < seqs[1].rank
    work = Work()
    for turn in range(40):
        work.add("later" if turn % 2 else "first", 0.0, 20, 50, priority=turn % 2)
    run = work.run()
    assert work.jct_s(run, "first") < 0.85 * work.jct_s(run, "later")


# No change of mind for little


def test_equals_do_not_displace_each_other():
    work = Work()
    for turn in range(300):
        work.add("known", 0.3 * turn, 40, work.rng.randint(100, 140))
    for _ in range(80):
        work.add("equal", 100.0, 40, 120)
    run = work.run()
    before = work.run(until_s=100.0).stats.preemptions
    assert run.stats.preemptions - before <= 20


# Copies


def test_waiting_for_copies_stays_within_its_budget():
    slow = replace(DEVICE, prefill_token_s=2e-4, page_out_s=1.5e-3, page_in_s=1.5e-3)
    tight = replace(EIGHT, num_pages=80, host_pages=2000, max_slots=16)
    work = Work()
    for turn in range(400):
        output = work.rng.choice([10, 40, 300])
        work.add("all", 0.2 * turn, work.rng.randint(10, 100), output, most=800)
    free = replace(Tuning(), copy_share=100.0, copy_burst_s=1e9)
    stalls, runs = [], [work.run(limits=tight, device=slow, tuning=t) for t in (Tuning(), free)]
    for run in runs:
        assert run.stats.pages_in > 500
        assert run.stats.recomputed_tokens < 0.02 * run.stats.computed_tokens
        stalls.append(run.stall_s / run.busy_s)
    assert stalls[0] < 0.05
    assert stalls[1] > 1.5 * stalls[0]


# Clients


def flood(heavy: str, light: str) -> Work:
    """200 requests at once, and five of another a little later."""
    work = Work()
    for turn in range(400):
        work.add("known", 0.2 * turn, 60, work.rng.randint(60, 120))
    for _ in range(200):
        work.add("flood", 100.0, 60, work.rng.randint(60, 120), client=heavy)
    for _ in range(5):
        work.add("small", 102.0, 60, work.rng.randint(60, 120), client=light)
    return work


def test_a_flood_does_not_hold_another_client_up():
    work, all_one = flood("heavy", "light"), flood("", "")
    run = work.run()
    assert work.jct_s(run, "small") < 0.5 * work.jct_s(run, "flood")
    assert work.jct_s(run, "small") < 0.4 * all_one.jct_s(all_one.run(), "small")


# Bounded books


def test_nothing_is_remembered_of_those_who_are_gone():
    """20,000 requests, many more of them ending in a step than are looked at again."""
    bounds = Limits(4, 2000, 0, 64, 512, 256, 10**6, 10**6)
    work, at = Work(), 0.0
    for turn in range(20_000):
        at += work.rng.expovariate(1600.0)
        work.add("all", at, 3, work.rng.choice([1, 2, 4]), most=50, client=str(turn))
    cost = CostModel([0.01], (1,), 1e-5, 1e-5)
    policy, most = Adaptive(bounds, cost), [0] * 5

    def look(finished: int) -> None:
        books = policy._fresh, policy._latest, policy._stale
        counts = [*map(len, books), len(policy._fairness._accounts), len(policy._history._own)]
        most[:] = map(max, most, counts)

    scheduler = Scheduler(bounds, policy, cost)
    run = simulate(scheduler, work.arrivals, work.lengths, cost.copy(), progress=look)
    assert run.stats.finished > 15 * run.steps  # in a step
    assert max(most[:3]) < 500
    assert max(most[3:]) < 2000
    assert not policy._standings
