"""Draws against numpy: what is cut, how often each token comes, and that no row feels another."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve_jax.core.types import Admission, Sampling
from fastserve_jax.runtime import sampling
from pallas_kernels import cpu

VOCAB, CONTEXT = 700, 64  # more than pick.CANDIDATES and _LANES, and no multiple: every path is met
admit = jax.jit(sampling.admit)
draw = jax.jit(sampling.draw)


@pytest.fixture(scope="module", autouse=True, params=["kernel", "xla"])
def form(request):
    """By the kernel of this processor, where there is one, and by what runs everywhere."""
    if request.param == "kernel":
        if not cpu.runs():
            pytest.skip(f"no kernels here: {cpu.missing()}")
        yield request.param
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "runs", lambda: False)
        draw.clear_cache()
        yield request.param
    draw.clear_cache()


def state_of(rules, prompts=None):
    """One slot per entry of `rules`; row i's tokens are `prompts[i]`: (tokens, prompt length)."""
    state = sampling.empty_state(len(rules), CONTEXT, VOCAB)
    for slot, rule in enumerate(rules):
        tokens, prompt_tokens = prompts[slot] if prompts else ((1,), 1)
        admission = Admission(slot, slot, tuple(tokens), prompt_tokens, rule)
        state = admit(state, slot, sampling.slot_row(admission, CONTEXT, VOCAB))
    return state


def tokens_of(logits, rules, positions=None, prompts=None):
    count = len(rules)
    at = np.full(count, 1) if positions is None else np.asarray(positions)
    drawn = draw(jnp.asarray(logits, jnp.float32), state_of(rules, prompts), np.arange(count), at)
    return np.asarray(drawn.tokens), drawn


def allowed(logits, rule):
    """The set that temperature, min_p, top_k and top_p leave, as numpy says it. float64."""
    scaled = np.asarray(logits, np.float64) / rule.temperature
    p = np.exp(scaled - scaled.max())
    keep = p >= rule.min_p
    if rule.top_k:
        keep &= p >= np.sort(p)[::-1][min(rule.top_k, len(p)) - 1]
    p = np.where(keep, p, 0)
    if rule.top_p < 1:
        order = np.argsort(-p)
        mass = np.cumsum(p[order])
        last = np.searchsorted(mass, rule.top_p * p.sum())
        keep &= p >= p[order[min(last, len(p) - 1)]]
    p = np.where(keep, p, 0)
    return p / p.sum()


RULES = {
    "plain": Sampling(1),
    "cold": Sampling(1, temperature=0.3),
    "top_k": Sampling(1, top_k=5),
    "deep_top_k": Sampling(1, top_k=300),
    "top_p": Sampling(1, top_p=0.5),
    "deep_top_p": Sampling(1, temperature=2.0, top_p=0.97),
    "min_p": Sampling(1, min_p=0.2),
    "all": Sampling(1, temperature=1.5, top_k=200, top_p=0.9, min_p=0.01),
}


@pytest.mark.parametrize("name", RULES)
def test_frequencies_are_the_distribution(name):
    rows, logits = 4000, np.random.default_rng(5).normal(0, 1.5, VOCAB)
    want = allowed(logits, RULES[name])
    state = state_of([RULES[name]])
    state = sampling.SlotState(*(jnp.repeat(x, rows, 0) for x in state))
    state = state._replace(seed=jnp.arange(rows, dtype=jnp.uint32))
    slots, at = np.arange(rows), np.ones(rows, np.int32)
    tokens = np.asarray(draw(jnp.tile(jnp.asarray(logits), (rows, 1)), state, slots, at).tokens)
    assert want[tokens].min() > 0, "a token that was cut was drawn"
    counts = np.bincount(tokens, minlength=VOCAB)
    # Pearson's statistic over tokens expected often enough, the rest together
    often = want * rows >= 8
    expected = np.append(want[often], want[~often].sum()) * rows
    got = np.append(counts[often], counts[~often].sum())
    terms = (got - expected)[expected > 0] ** 2 / expected[expected > 0]
    freedom = max(len(terms) - 1, 1)
    assert terms.sum() < freedom + 5 * np.sqrt(2 * freedom), (terms.sum(), freedom)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.floats(0.05, 3.0),
    st.integers(0, VOCAB + 5),
    st.floats(0.01, 1.0),
    st.floats(0.0, 1.0),
    st.sampled_from([0.1, 1.0, 10.0]),
)
def test_nothing_that_was_cut_is_drawn(seed, temperature, top_k, top_p, min_p, spread):
    rule = Sampling(1, temperature, top_k, top_p, min_p, seed)
    logits = np.random.default_rng(seed).normal(0, spread, (4, VOCAB)).astype(np.float32)
    logits = np.round(logits, 1)  # ties
    tokens, _ = tokens_of(logits, [replace(rule, seed=(seed + i) % 2**32) for i in range(4)])
    for row, token in enumerate(tokens):
        slack = replace(rule, top_p=min(1.0, rule.top_p * (1 + 1e-5) + 1e-6))
        slack = replace(slack, min_p=rule.min_p * (1 - 1e-5))
        assert allowed(logits[row], slack)[token] > 0


def test_a_draw_does_not_feel_its_neighbours():
    logits = np.random.default_rng(0).normal(0, 2, (8, VOCAB))
    rules = [Sampling(1, 0.9, (0, 7, 300)[i % 3], (1.0, 0.8)[i % 2], seed=i) for i in range(8)]
    together, _ = tokens_of(logits, rules, positions=np.arange(8) + 1)
    for row in range(8):
        alone, _ = tokens_of(logits[row : row + 1], rules[row : row + 1], positions=[row + 1])
        assert alone[0] == together[row]


def test_seed_and_position_decide():
    logits = np.zeros((1, VOCAB))
    first = [int(tokens_of(logits, [Sampling(1, seed=3)], positions=[p])[0][0]) for p in (1, 2, 1)]
    other = int(tokens_of(logits, [Sampling(1, seed=4)], positions=[1])[0][0])
    assert first[0] == first[2]
    assert len({first[0], first[1], other}) == 3


def test_greedy_takes_the_first_of_the_best():
    logits = np.zeros((2, VOCAB))
    logits[0, [41, 600]] = 3
    assert tokens_of(logits, [Sampling(1, temperature=0)] * 2)[0].tolist() == [41, 0]


def test_penalties_as_numpy():
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 3, VOCAB)
    prompt, output = [5, 9, 5, 11], [7, 7, 9, 600, 7]
    rule = Sampling(
        1,
        temperature=0,
        repetition_penalty=1.7,
        presence_penalty=0.4,
        frequency_penalty=0.9,
        logprobs=20,
    )
    want = logits.copy()
    for token in {*prompt, *output}:
        want[token] = want[token] / 1.7 if want[token] > 0 else want[token] * 1.7
    for token in set(output):
        want[token] -= 0.4 + 0.9 * output.count(token)
    for lift in (*prompt, *output, 200):  # each seen token once with the best chance to win
        raised, expected = logits.copy(), want.copy()
        raised[lift] += 4
        factor = 1.0
        if lift in {*prompt, *output}:
            factor = 1 / 1.7 if raised[lift] > 0 else 1.7
        expected[lift] = raised[lift] * factor
        if lift in output:
            expected[lift] -= 0.4 + 0.9 * output.count(lift)
        tokens, drawn = tokens_of(raised[None], [rule], [9], [(prompt + output, len(prompt))])
        assert tokens[0] == expected.argmax()
        plain = raised - np.log(np.exp(raised).sum())  # logprobs are the model's own
        np.testing.assert_allclose(drawn.logprobs[0], plain[tokens[0]], atol=1e-4)


def test_bias_and_min_tokens():
    logits = np.zeros((1, VOCAB))
    logits[0, 3], logits[0, 8] = 5, 4
    biased = Sampling(1, temperature=0, logit_bias=((650, 9.0), (3, -100.0)))
    assert tokens_of(logits, [biased])[0][0] == 650
    held = Sampling(1, temperature=0, min_tokens=3, stop_ids=frozenset({3}))
    prompts = [((1, 1), 2)]
    assert [
        int(tokens_of(logits, [held], [position], prompts)[0][0]) for position in (2, 3, 4, 5)
    ] == [8, 8, 8, 3]


def test_bad_numbers_are_named_and_stay_in_their_row():
    logits = np.random.default_rng(2).normal(0, 1, (4, VOCAB)).astype(np.float32)
    fine, _ = tokens_of(logits, [Sampling(1, seed=1)] * 4)
    logits[1, 13], logits[2, 600] = np.nan, np.inf
    tokens, _ = tokens_of(logits, [Sampling(1, seed=1)] * 4)
    assert tokens.tolist() == [fine[0], -1, -1, fine[3]]


def test_logprobs_of_the_token_and_its_rivals():
    logits = np.random.default_rng(3).normal(0, 2, (2, VOCAB)).astype(np.float32)
    _, drawn = tokens_of(logits, [Sampling(1, temperature=0, logprobs=5), Sampling(1)])
    plain = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    best = np.argsort(-plain[0])[: sampling.MAX_TOP_LOGPROBS]
    np.testing.assert_array_equal(drawn.top_ids[0], best)
    np.testing.assert_allclose(drawn.top_logprobs[0], plain[0][best], atol=1e-5)
    assert float(drawn.logprobs[0]) == float(drawn.top_logprobs[0, 0])  # the very same float


def test_padding_rows_ask_for_nothing(form):
    state = state_of([Sampling(1, seed=9)])
    logits = jnp.asarray(np.random.default_rng(4).normal(0, 1, (4, VOCAB)), jnp.float32)
    padded = draw(logits, state, np.array([0, 1, 1, 1]), np.ones(4, np.int32)).tokens
    alone = draw(logits[:1], state, np.array([0]), np.ones(1, np.int32)).tokens
    assert padded[0] == alone[0]
    best = jnp.argmax(logits[1:], -1)
    np.testing.assert_array_equal(padded[1:], best * (form == "xla"))
