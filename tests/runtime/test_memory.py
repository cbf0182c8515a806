"""The KV pool's size from free memory, and what is said when nothing fits."""

import re

import numpy as np
import pytest

from fastserve_jax.errors import DoesNotFit
from fastserve_jax.models.config import ModelConfig
from fastserve_jax.runtime.memory import (
    MOST_HOST_BYTES,
    FreeMemory,
    plan_host_pages,
    plan_memory,
)

CONFIG = ModelConfig("llama", 1000, 64, 2, 4, 2, 16, 128, 4096, 1e-5)
PAGE = 2 * 2 * 16 * 16 * 4 * 2  # key and value, heads, dim, tokens, float32, layers
WEIGHTS = 1 << 20


def plan(free_bytes, num_pages=0, max_context=1024, grain=1, fraction=0.5, whole_bytes=0):
    return plan_memory(
        CONFIG,
        np.float32,
        WEIGHTS,
        page_size=16,
        num_pages=num_pages,
        max_context=max_context,
        max_slots=4,
        step_tokens=16,
        free=FreeMemory(free_bytes, fraction, grain, whole_bytes=whole_bytes),
    )


def test_a_page_is_as_large_as_its_numbers():
    assert plan(1 << 30).page_bytes == PAGE


def test_the_pool_is_what_may_be_taken_and_no_more_than_can_be_used():
    assert plan(200 * PAGE * 2).num_pages == 128  # 200, rounded down to a power of two
    assert plan(200 * PAGE * 2, grain=16).num_pages == 200
    assert plan(1 << 34).num_pages == 4 * 1024 // 16  # four slots at full context
    assert plan(1 << 30, num_pages=77).num_pages == 77


def test_a_little_more_or_less_free_memory_gives_the_same_pool():
    assert {plan(int(300 * PAGE * 2 * f)).num_pages for f in (0.95, 1, 1.05)} == {256 // 2 * 2}


def test_a_share_of_the_whole_does_not_vary_with_what_is_free():
    whole = 300 * PAGE * 2
    share = {FreeMemory(int(whole * f), 0.5, 1, whole_bytes=whole).share_bytes for f in (0.6, 1.0)}
    assert share == {300 * PAGE}
    pools = {plan(WEIGHTS + int(whole * f), whole_bytes=whole).num_pages for f in (0.5, 0.7, 0.9)}
    assert pools == {256}
    assert plan(WEIGHTS + 120 * PAGE, whole_bytes=whole).num_pages == 64  # little is free


def test_one_request_always_has_room():
    assert plan(WEIGHTS + 120 * PAGE, fraction=0.01).num_pages == 1024 // 16


def test_what_would_fit_is_said_and_is_true():
    free_bytes = WEIGHTS + 40 * PAGE
    with pytest.raises(DoesNotFit) as refused:
        plan(free_bytes)
    pages, context = map(int, re.findall(r"(?:kv\.pages|max_context)=(\d+)", str(refused.value)))
    fits = plan(free_bytes, num_pages=pages, max_context=context)
    assert fits.num_pages == pages
    with pytest.raises(DoesNotFit):
        plan(free_bytes, num_pages=pages + 1)


def test_a_model_too_large_says_what_it_needs():
    with pytest.raises(DoesNotFit, match="at the least"):
        plan(WEIGHTS // 2)


def host(plan, host_pages, free_bytes, grain=16, fraction=0.5, shared=False):
    return plan_host_pages(plan, host_pages, FreeMemory(free_bytes, fraction, grain, shared))


def test_host_pages_are_a_fraction_of_the_hosts_memory():
    device = plan(200 * PAGE * 2)
    assert host(device, -1, 1000 * PAGE * 2).host_pages == 992  # 1000, rounded down to 32s
    assert host(device, -1, 2 * MOST_HOST_BYTES, fraction=0.9).host_bytes <= MOST_HOST_BYTES
    assert host(device, 0, 1000 * PAGE).host_pages == 0
    assert host(device, 77, 1000 * PAGE).host_pages == 77


def test_in_one_memory_there_are_as_many_host_pages_as_fit_but_no_more_than_device_pages():
    device = plan(200 * PAGE * 2)
    assert device.num_pages == 128
    assert host(device, -1, 1000 * PAGE, grain=1, shared=True).host_pages == 128
    assert host(device, -1, 200 * PAGE, grain=1, shared=True).host_pages == 0  # no room is left
    assert host(device, -1, 400 * PAGE, 1, fraction=0.25, shared=True).host_pages == 64


def test_too_many_host_pages_are_refused_with_how_many_would_do():
    for shared in (False, True):
        with pytest.raises(DoesNotFit) as refused:
            host(plan(200 * PAGE * 2), 10**6, 300 * PAGE, shared=shared)
        fits = int(re.findall(r"host_pages=(\d+)", str(refused.value))[0])
        assert host(plan(200 * PAGE * 2), fits, 300 * PAGE, shared=shared).host_pages == fits
        with pytest.raises(DoesNotFit):
            host(plan(200 * PAGE * 2), fits + 1, 300 * PAGE, shared=shared)


def test_the_plan_names_the_host_pages_where_there_are_any():
    device = plan(200 * PAGE * 2)
    assert "host" not in str(device)
    assert "(77 pages)" in str(host(device, 77, 1000 * PAGE))
