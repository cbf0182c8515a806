"""What is expected of output lengths, against plain counting over all that was seen."""

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve_jax.core.predict import History, output_edges

PROMPTS = (5, 100, 2000)  # three groups
CLIENTS = ("", "a", "b")


def test_bins_widen_and_cover_everything():
    edges = output_edges(4096)
    assert edges[:8] == [0, 8, 16, 24, 32, 40, 50, 62]
    assert edges[-1] > 4096 >= edges[-2]
    history = History(4096)
    for k, (first, after) in enumerate(pairwise(edges)):
        assert history.bin(first) == history.bin(after - 1) == k
    assert history.bin(10**9) == len(edges) - 2
    groups = [history.group(tokens) for tokens in range(1, 5000)]
    assert groups == sorted(groups)
    assert set(groups) == set(range(groups[-1] + 1))


@pytest.mark.parametrize("longest", [1, 8, 9, 40, 131_072])
def test_any_context_will_do(longest):
    history = History(longest)
    for ended in (True, False):
        for length in (0, longest, longest + 1):
            history.record(history.group(longest), length, ended=ended)
    for output in (0, longest, 2 * longest):
        assert 0 < history.left_tokens(history.group(1), output) <= history.edges[-1]


# Against counting

Seen = list[tuple[str, int, int, bool]]  # client, prompt and output tokens, ended


def hazards(history: History, seen: Seen, client: str, prompt: int) -> list[float]:
    """Kaplan-Meier over bins: of those known to have lived through a bin's beginning and not cut
    off in it, how many ended there; older ones count less. All of them lean on a prior, those of
    like prompts on all, and a client's own on those."""
    edges, group = history.edges, history.group(prompt)
    same = [history.group(one[1]) == group for one in seen]
    own = [is_same and one[0] == client for is_same, one in zip(same, seen, strict=True)]
    layers = [([True] * len(seen), 1.0), (same, 100.0)]
    if client:
        layers.append((own, 30.0))
    found = []
    for k, (first, after) in enumerate(pairwise(edges)):
        if k == len(edges) - 2:
            found.append(1.0)
            continue
        chance = 1.0 - math.exp((first - after) / 200.0)
        for members, leaning in layers:
            ends = at_risk = 0.0
            for age, (_, _, output, ended) in enumerate(reversed(seen), 1):
                if members[-age]:
                    weight = 2.0 ** (-age / 4000.0)
                    ends += weight * (ended and first <= output < after)
                    at_risk += weight * (output >= after or (ended and first <= output))
            chance = (ends + leaning * chance) / (at_risk + leaning)
        found.append(chance)
    return found


def outcomes(history: History, chances: list[float], k: int) -> list[tuple[float, float, float]]:
    """For a request in bin k, of each bin from there: chance to end in it, tokens spent if it
    ends there, tokens spent if it lives through it. An end is in the middle of its bin."""
    found, alive, tokens = [], 1.0, 0.0
    for m in range(k, len(chances)):
        width = history.edges[m + 1] - history.edges[m]
        found.append((alive * chances[m], tokens + width / 2, tokens + width))
        alive *= 1.0 - chances[m]
        tokens += width
    return found


def expected(history: History, chances: list[float], k: int) -> float:
    return sum(chance * tokens for chance, tokens, _ in outcomes(history, chances, k))


def gittins(
    history: History, chances: list[float], k: int, worths: list[float], ahead: float = 0.0
) -> float:
    """The best of all stopping times: expected tokens spent over what is expected to be gained."""
    best, ended, gained, spent = math.inf, 0.0, 0.0, ahead
    for (chance, tokens, through), worth in zip(
        outcomes(history, chances, k), worths[k:], strict=True
    ):
        ended += chance
        gained += chance * worth
        spent += chance * tokens
        best = min(best, (spent + (1.0 - ended) * through) / gained) if gained else best
    return best


def worths(history: History, seen: Seen, brevity: float) -> list[float]:
    """Of an answer, by length: its seconds count once, its seconds per token `brevity` times, on
    average over all answers."""
    middles = [(a + b) / 2 for a, b in pairwise(history.edges)]
    everybody = hazards(history, seen, "", 20)  # no such prompt was seen: as all together
    far = outcomes(history, everybody, 0)
    inverse = sum(chance / middle for (chance, _, _), middle in zip(far, middles, strict=True))
    return [(1 + brevity / (inverse * middle)) / (1 + brevity) for middle in middles]


def random_history(
    seed: int, longest: int, count: int, brevity: float = 0.0
) -> tuple[History, Seen]:
    rng = random.Random(seed)
    history, seen = History(longest, brevity), []
    for _ in range(count):
        client, prompt = rng.choice(CLIENTS), rng.choice(PROMPTS)
        output = min(int(rng.expovariate(1 / (0.02 * prompt + 40))), longest)
        ended = rng.random() < 0.7
        group, counted = history.group(prompt, client), 0
        for so_far in sorted(rng.randint(0, output) for _ in range(rng.randint(0, 3))):
            counted = history.outlive(group, so_far, counted)
        history.record(group, output, ended, counted)
        seen.append((client, prompt, output, ended))
    return history, seen


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([30, 400, 4096]),
    st.integers(0, 300),
    st.sampled_from([0.0, 1.0, 5.0]),
)
def test_tables_are_those_of_counting(seed, longest, count, brevity):
    history, seen = random_history(seed, longest, count, brevity)
    worth = worths(history, seen, brevity)
    for client in CLIENTS:
        for prompt in PROMPTS:
            group = history.group(prompt, client)
            chances = hazards(history, seen, client, prompt)
            for k, edge in enumerate(history.edges[:-1]):
                left = history.left_tokens(group, edge)
                assert left == pytest.approx(expected(history, chances, k))
                # It stops looking where one in a hundred is left.
                index = history.expect(group, edge)[1]
                assert index == pytest.approx(gittins(history, chances, k, worth), rel=0.02)
            new = history.new_index_tokens(group, 50.0)
            assert new == pytest.approx(gittins(history, chances, 0, worth, 50.0), rel=0.02)


def test_an_index_is_never_more_than_what_is_left():
    history, _ = random_history(5, 4096, 300)
    for output in range(0, 4096, 64):
        left, index, _ = history.expect(3, output)
        assert index <= left * 1.01


def test_brevity_lets_the_new_pass_who_have_outlived_their_chance_to_be_short():
    """Outputs all as likely to end at any token: without it, age says nothing of what is best."""
    plain, brief = History(2048), History(2048, brevity=1.0)
    rng = random.Random(3)
    for _ in range(3000):
        output = int(rng.expovariate(1 / 200))
        for history in (plain, brief):
            history.record(history.group(100), output, ended=True)
    group = plain.group(100)
    ages = (0, 24, 100, 300)
    plainly = [plain.expect(group, age)[1] for age in ages]
    assert max(plainly) < 1.4 * min(plainly)
    briefly = [brief.expect(group, age)[1] for age in ages]
    assert briefly == sorted(briefly)
    assert briefly[-1] > 2.5 * briefly[0]
    # A long prompt before it takes the gain away again.
    assert brief.new_index_tokens(group, 1000.0) > briefly[-1]


def test_two_kinds_are_told_apart_as_they_age():
    """Half end at ten tokens, half at a thousand: who has outlived the first has a long way."""
    history = History(2048)
    group = history.group(100)
    for turn in range(2000):
        history.record(group, 10 if turn % 2 else 1000, ended=True)
    assert history.left_tokens(group, 0) == pytest.approx(505, rel=0.1)
    assert history.left_tokens(group, 40) == pytest.approx(960, rel=0.1)
    # But to try a little is cheap: about twelve tokens for an even chance.
    assert history.expect(group, 0)[1] == pytest.approx(24, rel=0.3)
    assert history.expect(group, 40)[1] == pytest.approx(960, rel=0.1)


def test_before_anything_is_seen_a_guess_stands():
    history = History(4096)
    left = [history.left_tokens(0, output) for output in (0, 100, 1000)]
    assert 100 < left[0] < left[1] < left[2] < 4096


# Who was cut off


def test_those_cut_off_do_not_make_outputs_look_short():
    rng = random.Random(1)
    history, ended = History(4096), []
    group = history.group(100)
    for _ in range(4000):
        length, patience = rng.expovariate(1 / 200), rng.expovariate(1 / 200)
        history.record(group, int(min(length, patience)), ended=length < patience)
        if length < patience:
            ended.append(length)
    assert sum(ended) / len(ended) < 120  # what counting only those would say
    assert history.left_tokens(group, 0) == pytest.approx(200, rel=0.1)
    assert history.left_tokens(group, 300) == pytest.approx(200, rel=0.2)


def test_those_who_live_on_count_as_far_as_they_came():
    """Ten short ones are over, a hundred live: new ones are not all short."""
    known, living = History(4096), History(4096)
    group = known.group(100)
    counted = [living.outlive(group, 200) for _ in range(100)]
    for _ in range(100):
        known.record(group, 200, ended=False)
    for _ in range(10):
        known.record(group, 10, ended=True)
        living.record(group, 10, ended=True)
    assert living.left_tokens(group, 0) > 180
    assert living.left_tokens(group, 0) == pytest.approx(known.left_tokens(group, 0), rel=0.01)
    assert [living.outlive(group, 200, bins) for bins in counted] == counted
    assert living.bin(200) == counted[0]


def test_a_limit_that_all_run_into_says_nothing_of_what_lies_beyond():
    history = History(4096)
    group = history.group(100)
    for _ in range(500):
        history.record(group, 64, ended=False)
    assert history.left_tokens(group, 0) > 64 + 0.9 * History(4096).left_tokens(group, 64)


# Groups and time


def test_a_new_group_leans_on_all_and_then_stands_alone():
    history = History(4096)
    common, own = history.group(100), history.group(2000)
    for _ in range(1000):
        history.record(common, 50, ended=True)
    lefts = []
    for count in (0, 5, 100, 1000):
        while history._risked[own][0] / history._weight < count * 0.9:
            history.record(own, 500, ended=True)
        history._made_at[own] = -1
        lefts.append(history.left_tokens(own, 0))
    assert lefts == sorted(lefts)
    assert lefts[0] < 75
    assert lefts[1] < 100
    assert lefts[3] > 400
    history._made_at[common] = -1
    assert history.left_tokens(common, 0) < 100


def test_a_client_is_soon_known_by_its_own():
    history = History(4096)
    own, others = history.group(100, "own"), history.group(100, "others")
    assert len({own, others, history.group(100), history.group(2000, "own")}) == 4
    assert history.group(100, "own") == own
    for _ in range(1000):
        history.record(others, 50, ended=True)
    for count, least in ((0, 40), (30, 200), (300, 400)):
        for _ in range(count):
            history.record(own, 500, ended=True)
        history._made_at[own] = -1
        assert least < history.left_tokens(own, 0) < 550
    history._made_at[others] = -1
    assert history.left_tokens(others, 0) < 75
    assert history.left_tokens(history.group(100, "new"), 0) > 100  # it leans on both


def test_there_is_room_for_so_many_clients():
    history = History(400)
    groups = {history.group(100, str(client)) for client in range(5000)}
    assert len(groups) < 2000
    assert history.group(100, "one more") == history.group(100)


def test_what_was_long_ago_fades():
    history = History(4096)
    for length in (1000, 20):
        for _ in range(10_000):
            history.record(3, length, ended=True)
    now = history.left_tokens(3, 0)
    assert now < 20 + 0.25 * 1000  # half of all there ever were had a thousand
    assert history.left_tokens(3, 200) == pytest.approx(800, rel=0.1)  # of the old ones


def test_weights_that_grow_large_are_scaled_down():
    histories = [History(400), History(400)]
    histories[1]._weight = 0.6e6
    rng = random.Random(2)
    for _ in range(3500):
        one = 1, int(rng.expovariate(1 / 60)), rng.random() < 0.8
        for history in histories:
            history.record(*one)
    assert histories[1]._weight < 1e6
    for output in (0, 50, 200):
        lefts = [history.left_tokens(1, output) for history in histories]
        assert lefts[0] == pytest.approx(lefts[1])


def test_tables_follow_without_being_made_anew_every_time():
    history, made = History(400), []
    make = history._hazards
    history._hazards = lambda group: (made.append(history._seen) if not group else 0, make(group))[
        1
    ]
    for _ in range(3000):
        history.record(0, 10, ended=True)
        history.left_tokens(0, 0)
    assert len(made) < 100
    assert max(after - before for before, after in pairwise([*made, 3000])) <= 64
