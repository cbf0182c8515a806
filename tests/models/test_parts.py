"""What each of several devices has of a model, as numbers; that they add up to the model is
tests/serve/test_devices.py's."""

from dataclasses import replace

import pytest

from fastserve_jax.errors import ConfigError
from fastserve_jax.models.parts import EXPERT_INNER, EXPERTS, GATES, QKV, Parts
from tests.models.families import FAMILIES


@pytest.mark.parametrize("count", [4, 5, 12])
def test_what_does_not_divide_is_refused(count):
    with pytest.raises(ConfigError, match=rf"do not divide among {count} devices"):
        Parts(count).of(FAMILIES["llama"])


def test_a_kv_head_may_be_on_several_devices_and_no_device_without_one():
    own = Parts(6).of(replace(FAMILIES["qwen2"], intermediate_size=96))
    assert (own.num_heads, own.num_kv_heads, own.intermediate_size) == (1, 1, 16)
    assert own.vocab_size == 97, "a vocabulary that does not divide stays whole"


def test_fused_parts_are_cut_each_by_itself():
    config = FAMILIES["llama"]  # six heads of eight, two of keys and of values; 80 inner columns
    assert Parts(2).ranges(QKV, config, 1) == ((24, 48), (56, 64), (72, 80))
    assert Parts(2).ranges(GATES, config, 1) == ((40, 80), (120, 160))


def test_experts_go_by_groups_and_their_columns_within():
    config = FAMILIES["mixtral"]  # four experts of 80 columns
    parts = Parts(2, 2)
    assert (parts.of(config).num_experts, parts.of(config).intermediate_size) == (2, 80)
    assert [parts.ranges(EXPERTS, config, part) for part in (0, 1)] == [((0, 2),), ((2, 4),)]
    assert parts.ranges(EXPERT_INNER, config, 1) == ((0, 80),)
    within = Parts(2, 1)
    assert within.ranges(EXPERTS, config, 1) == ((0, 4),)
    assert within.ranges(EXPERT_INNER, config, 1) == ((40, 80),)
    with pytest.raises(ConfigError, match="4 experts do not divide among 3 devices"):
        Parts(3, 3).of(config)
