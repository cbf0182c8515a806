"""Plans without chips' compilers: what is decided, counted and said, on the CPU that is here."""

import io
import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest
from rich.console import Console

from fastserve_jax.chips import Chips, Rates, chips, rates_of
from fastserve_jax.config import MeshSettings, load_settings, parse_mesh
from fastserve_jax.errors import ConfigError
from fastserve_jax.models.config import ModelConfig
from fastserve_jax.models.parts import Parts
from fastserve_jax.planning import plan, report
from fastserve_jax.planning.floor import Sizes
from fastserve_jax.planning.site import make_site
from fastserve_jax.runtime.mesh import choose_axes, slices_of
from pallas_kernels import Target, compiling_for
from tests.models.families import FAMILIES

RATES = Rates(64 << 20, 1e9, 1e12, 2e12, 1e8)
SETTINGS = load_settings(
    None,
    [
        "engine.max_slots=4",
        "engine.step_tokens=16",
        "engine.max_context=64",
        "model.dtype=f32",
        "kv.page_size=4",
    ],
)
LLAMA3_70B = ModelConfig("llama", 128256, 8192, 80, 64, 8, 128, 28672, 8192, 1e-5, tied_head=False)


def site(rates=RATES, config=FAMILIES["llama"], settings=SETTINGS):
    here = Chips("laptop", "cpu", jax.devices()[:1], rates)
    return make_site("tiny", config, settings, "laptop:1", here)


@pytest.fixture(scope="module")
def planned():
    with compiling_for(Target("cpu")):
        return plan.plan(site())


WANTED = {"model", "chip", "devices", "fits", "memory_bytes", "peak_bytes", "argument_bytes"}
WANTED |= {"weight_bytes", "kv_cache_bytes", "alias_bytes", "temp_bytes", "host_temp_bytes"}
WANTED |= {"collectives", "kernels", "compile_s", "kv_pages", "max_concurrent", "step"}


def test_what_is_said_as_json(planned):
    decode, mixed = json.loads(report.as_json(planned))
    assert (decode["program"], mixed["program"]) == ("decode", "mixed")
    assert (decode["tokens"], mixed["tokens"]) == (4, 16)
    for step in (decode, mixed):
        assert set(step) >= WANTED
        assert step["fits"]
        assert step["alias_bytes"] == step["kv_cache_bytes"] == step["kv_pages"] * PAGE_BYTES
        assert step["kv_pages"] == 4 * 64 // 4, "as many as four slots can use"
        assert step["max_concurrent"] == 4
        kept = step["weight_bytes"] + step["kv_cache_bytes"]
        assert kept < step["argument_bytes"] < kept + 10_000
        assert step["argument_bytes"] < step["peak_bytes"] <= step["memory_bytes"]
        assert step["collectives"] == {}
        assert set(step["step"][0]) >= {"batch", "floor_s", "tokens_per_s"}
    assert [e["batch"] for e in decode["step"]] == [1, 4]


PAGE_BYTES = 4 * 2 * 2 * 8 * 4 * 2  # tokens, key and value, KV heads, dim, float32, layers


def test_what_a_person_reads(planned):
    out = io.StringIO()
    report.show(planned, RATES, Console(file=out, width=100))
    text = out.getvalue()
    assert "tiny on laptop:1: 1 device, 1 data x 1 model" in text
    assert "decode: fits, " in text
    assert "pages updated in place: all" in text
    assert "Nothing was run." in text


def test_what_does_not_fit_is_not_compiled_and_says_by_how_much():
    decode, mixed = plan.plan(site(replace(RATES, memory_bytes=200_000)))
    for step in (decode, mixed):
        assert not step.fits
        assert step.compile_s is None
        assert step.peak_bytes > step.memory_bytes
        assert "one request's pages 16 KiB" in step.why_not
    out = io.StringIO()
    report.show([decode, mixed], RATES, Console(file=out, width=100))
    assert "does not fit, " in out.getvalue()


def test_a_model_is_divided_as_far_as_its_kv_heads_go():
    def chosen(config, devices, asked=None, slices=1):
        return tuple(choose_axes(config, devices, asked or {}, slices).values())

    assert choose_axes(LLAMA3_70B, 16, {}) == {"data": 1, "expert": 1, "model": 16}
    assert chosen(LLAMA3_70B, 256) == (16, 1, 16)
    assert chosen(LLAMA3_70B, 16, {"data": 4}) == (4, 1, 4)
    assert chosen(LLAMA3_70B, 64, {"model": 64}) == (1, 1, 64)
    assert chosen(FAMILIES["llama"], 4) == (2, 1, 2)
    assert chosen(LLAMA3_70B, 32, slices=4) == (4, 1, 8), "no part of a replica on another slice"
    with pytest.raises(ConfigError, match="does not make 16 devices"):
        chosen(LLAMA3_70B, 16, {"model": 8, "data": 4})
    with pytest.raises(ConfigError, match="1 replicas do not divide among 2 slices"):
        chosen(LLAMA3_70B, 16, {"data": 1, "model": 16}, slices=2)
    with pytest.raises(ConfigError, match=r"6 heads .* among 4 devices; among 1 or 2 they do"):
        chosen(FAMILIES["llama"], 4, {"model": 4})
    with pytest.raises(ConfigError, match="the model has no experts"):
        chosen(LLAMA3_70B, 16, {"expert": 2})
    with pytest.raises(ConfigError, match="no axis rows: there are data, expert, model"):
        parse_mesh("rows=2")


def test_experts_are_divided_whole_as_far_as_they_go():
    def chosen(devices, **asked):
        return tuple(choose_axes(MIXTRAL, devices, asked).values())

    assert chosen(8) == (1, 8, 1)
    assert chosen(16) == (1, 8, 2)
    assert chosen(64) == (4, 8, 2)
    assert chosen(16, model=16) == (1, 1, 16)
    assert chosen(16, expert=4) == (1, 4, 4)
    assert chosen(16, expert=4, model=2) == (2, 4, 2)
    with pytest.raises(ConfigError, match="8 experts do not divide among 3 devices"):
        chosen(24, expert=3, model=8)


def test_a_chip_that_is_here_has_its_makers_rates():
    assert rates_of("TPU v5 lite").bandwidth == 819e9
    h100 = rates_of("NVIDIA H100 80GB HBM3")  # as one was seen to call itself, with 85.0 GB
    assert h100.bandwidth == 3.352e12
    assert 80e9 < h100.memory_bytes < 0.95 * 85.1e9
    assert rates_of("NVIDIA H200").bandwidth == 4.8e12  # the same: no word of its memory
    with pytest.raises(ConfigError, match="no rates of cpu are known"):
        rates_of("cpu")


def test_hosts_of_gpus_are_no_slices():
    def device(platform, number):
        return SimpleNamespace(platform=platform, slice_index=number)

    assert slices_of([device("tpu", number // 2) for number in range(4)]) == 2
    assert slices_of([device("gpu", number // 2) for number in range(4)]) == 1


def test_a_mesh_of_the_settings_is_planned():
    asked = replace(SETTINGS, mesh=MeshSettings(data=3))
    with pytest.raises(ConfigError, match="data=3, expert=1, model=1 does not make 1 devices"):
        site(settings=asked)


def test_slices_are_written_as_a_number():
    for written in ("4x4*", "4x4*two", "4x4*0"):
        with pytest.raises(ConfigError, match=r"write so many slices as 4x4\*2"):
            chips(f"v5e:{written}")


def test_how_a_mesh_is_written():
    assert parse_mesh("model=4,data=2") == {"model": 4, "data": 2}
    assert parse_mesh("") == {}
    for wrong in ("model", "model=0", "model=x", "=", "model=-1"):
        with pytest.raises(ConfigError, match="write it as model=4,data=2"):
            parse_mesh(wrong)


MIXTRAL = replace(
    LLAMA3_70B,
    **{"num_layers": 32, "hidden_size": 4096, "num_heads": 32, "intermediate_size": 14336},
    **{"num_experts": 8, "experts_per_token": 2},
)


def sizes(config=LLAMA3_70B, count=8):
    own = Parts(count).of(config)
    layer = config.hidden_size * (
        (own.num_heads * 2 + own.num_kv_heads * 2) * config.head_dim + 3 * own.intermediate_size
    )
    head = own.vocab_size * config.hidden_size
    return Sizes(
        config,
        Parts(count),
        weight_bytes=2 * (layer * config.num_layers + 2 * head),
        matrix_elements=layer * config.num_layers,
        expert_bytes=0,
        expert_elements=0,
        head_elements=head,
        embed_bytes=2 * head,
        token_bytes=2 * 2 * own.num_kv_heads * config.head_dim,
    )


def test_the_floor_of_a_step_by_hand():
    work = sizes().work(rows=32, tokens=32, context=1000)
    whole = sizes(count=1)
    assert work.bytes_read * 8 == pytest.approx(
        2 * (whole.matrix_elements + whole.head_elements) + 32 * 1000 * 80 * 2 * 2 * 8 * 128
    )
    products = 2 * 32 * (whole.matrix_elements + whole.head_elements)
    attended = 4 * 32 * 1000 * 80 * 64 * 128
    assert work.operations * 8 == pytest.approx(products + attended)
    # A ring of eight passes on 7 of 8 parts, twice for a sum, once for what is gathered.
    summed = 2 * (2 * 80 + 1) * 32 * 8192 * 4
    assert work.link_bytes == pytest.approx((summed + 32 * 128256 * 4) * 7 / 8)
    by_memory = Rates(1, 1e9, 1e30, 1e30, 1e30)
    assert work.floor_s(by_memory, False) == pytest.approx(work.bytes_read / 1e9)
    by_products = Rates(1, 1e30, 1e9, 2e9, 1e30)
    assert work.floor_s(by_products, False) == pytest.approx(work.operations / 1e9)
    assert work.floor_s(by_products, True) == pytest.approx(work.operations / 2e9)
    by_links = Rates(1, 1e30, 1e30, 1e30, 1e9)
    assert work.floor_s(by_links, False) == pytest.approx(work.link_bytes / 1e9)


def test_experts_are_multiplied_by_those_who_chose_them_and_read_if_anybody_did():
    elements = 8 * 3 * 4096 * 14336 * 32
    dense = sizes(MIXTRAL, 1)
    with_experts = replace(
        dense,
        weight_bytes=dense.weight_bytes + 2 * elements,
        expert_bytes=2 * elements,
        expert_elements=elements,
    )
    for rows in (1, 4, 64):
        plain, work = (s.work(rows, rows, 100) for s in (dense, with_experts))
        assert work.operations - plain.operations == 2 * rows * elements // 4
        share = (work.bytes_read - plain.bytes_read) / (2 * elements)
        assert share == pytest.approx(1 - 0.75**rows)


def test_a_window_is_all_that_its_layers_read():
    windows = replace(LLAMA3_70B, windows=tuple(512 if i % 2 else 0 for i in range(80)))
    plain, local = (sizes(c).work(4, 4, 4096).bytes_read for c in (LLAMA3_70B, windows))
    assert plain - local == 4 * 40 * (4096 - 512) * 2 * 2 * 128
