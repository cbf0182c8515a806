"""Every family, paged and chunked and batched, against the numpy oracle."""

import numpy as np
import pytest

from fastserve_jax.core.types import Admission, Plan, Sampling, Work
from tests.models.families import FAMILIES
from tests.models.oracle import logits
from tests.runtime.build import build_runner

CHUNKS = ((0, 7), (7, 1), (8, 12), (20, 1), (21, 1), (22, 9))  # start, count of a 31-token prompt


@pytest.mark.parametrize("name", FAMILIES)
async def test_prompt_logprobs_equal_the_oracle(name):
    """Two sequences, one whole and one in pieces, in the same steps and scattered pages."""
    config = FAMILIES[name]
    rng = np.random.default_rng(7)
    prompts = {1: rng.integers(0, 97, 31).tolist(), 2: rng.integers(0, 97, 16).tolist()}
    rules = Sampling(max_tokens=4, temperature=0, prompt_logprobs=3, logprobs=3)
    pages = {1: (9, 3, 40, 1, 17, 22, 8, 30), 2: (47, 0, 2, 5)}
    runner, arrays = build_runner(config)
    scored = {1: {}, 2: {}}
    sampled = {}
    with runner:
        for step, (start, count) in enumerate(CHUNKS):
            admissions = []
            if step == 0:
                admissions.append(Admission(1, 2, tuple(prompts[1]), 31, rules))
            if step == 1:
                admissions.append(Admission(2, 0, tuple(prompts[2]), 16, rules))
            first = -(-start // 4)
            new = pages[1][first : -(-(start + count) // 4)]
            work = [Work(1, 2, start, count, first, new, start + count == 31)]
            if step == 1:
                work.append(Work(2, 0, 0, 13, 0, pages[2][:4], False))
            if step == 3:
                work.append(Work(2, 0, 13, 3, 4, (), True))
            work.sort(key=lambda w: w.count > 1)
            result = await runner.dispatch(Plan(step, tuple(admissions), tuple(work)))
            for request_id, scores in result.scored.items():
                scored[request_id].update({s.position: s for s in scores})
            sampled.update(result.sampled)
    for request_id, prompt in prompts.items():
        want = logits(config, arrays, prompt)
        want -= np.log(np.exp(want).sum(-1, keepdims=True))
        assert sorted(scored[request_id]) == list(range(1, len(prompt)))
        for position, score in scored[request_id].items():
            row = want[position - 1]
            assert score.logprob == pytest.approx(row[prompt[position]], abs=2e-4)
            assert [lp for _, lp in score.top] == pytest.approx(np.sort(row)[:-4:-1], abs=2e-4)
        assert sampled[request_id].token == want[-1].argmax()
        assert sampled[request_id].logprob == pytest.approx(want[-1].max(), abs=2e-4)
