from __future__ import annotations

import asyncio

from prometheus_client.parser import text_string_to_metric_families

from fastserve_jax.core.sequence import Limits
from fastserve_jax.meters import HISTOGRAMS, Histogram
from fastserve_jax.metrics import Metrics

from . import openai_schema
from .kit import MODEL, LetterTokenizer, kit, token_ids

PROMISED = {
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info"),
    *("prompt_tokens", "generation_tokens", "request_success", "num_preemptions"),
    *("prefix_cache_queries", "prefix_cache_hits", "admission_rejections"),
    *("spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens"),
    *("websocket_connections_active", "websocket_connections", "slow_readers_dropped"),
    "websocket_connection_duration_seconds",
    *HISTOGRAMS,
}


async def scrape(server) -> dict:
    async with server.session.get(server.url + "/metrics") as answer:
        assert answer.content_type == "text/plain"
        text = await answer.text()
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(families: dict, name: str, sample: str = "", **labels: str) -> float:
    wanted = {"model_name": MODEL, **labels}
    (found,) = [
        s.value
        for s in families[f"fastserve:{name}"].samples
        if s.name == f"fastserve:{sample or name}" and s.labels == wanted
    ]
    return found


async def test_metrics_count_what_happened():
    async with kit() as server:
        server.state.metrics.observe(lambda: {"compiles_after_ready_total": 0, "hbm_bytes": 5})
        asked = {"model": MODEL, "prompt": "hello", "max_tokens": 10, "ignore_eos": True}
        for _ in range(3):
            await server.json("/v1/completions", asked)
        await server.json("/v1/completions", {**asked, "n": 2})
        await server.json("/v1/completions", {**asked, "temperature": 9}, status=400)
        await server.quiet()
        families = await scrape(server)
        head = await server.session.head(server.url + "/metrics")
        assert head.status == 200
    assert {name.removeprefix("fastserve:") for name in families} >= PROMISED
    assert value(families, "generation_tokens", "generation_tokens_total") == 50
    assert value(families, "prompt_tokens", "prompt_tokens_total") == 30
    done = "request_success_total"
    assert value(families, "request_success", done, finished_reason="length") == 5
    ttft = "time_to_first_token_seconds"
    assert value(families, ttft, f"{ttft}_count") == 5
    gaps = "inter_token_latency_seconds"
    assert value(families, gaps, f"{gaps}_count") == 45
    assert value(families, gaps, f"{gaps}_bucket", le="+Inf") == 45
    tokens = "request_generation_tokens"
    assert value(families, tokens, f"{tokens}_sum") == 50
    assert value(families, "num_requests_running") == 0
    assert value(families, "prefix_cache_queries", "prefix_cache_queries_total") > 0
    assert value(families, "compiles_after_ready", "compiles_after_ready_total") == 0
    assert value(families, "hbm_bytes") == 5


def test_a_histogram_counts_each_value_once_where_it_belongs():
    histogram = Histogram((1.0, 2.0, 4.0))
    for v in (0.5, 1.0, 1.5, 4.0, 100.0):
        histogram.observe(v)
    assert histogram.buckets() == ([("1.0", 2), ("2.0", 3), ("4.0", 4), ("+Inf", 5)], 107.0)


def test_two_registries_do_not_know_each_other():
    one, two = Metrics("one"), Metrics("two")
    two.of("two")
    one.of("one").request(5).token()
    assert b'fastserve:generation_tokens_total{model_name="two"} 0' in two.render()
    assert b'fastserve:generation_tokens_total{model_name="one"} 1' in one.render()


async def test_models_in_openais_shape():
    async with kit() as server:
        listed = await (await server.session.get(server.url + "/v1/models")).json()
        one = await (await server.session.get(f"{server.url}/v1/models/{MODEL}")).json()
    openai_schema.check("ListModelsResponse", listed)
    openai_schema.check("Model", one)
    assert listed["data"] == [one]
    assert one["max_model_len"] == 512


async def test_tokenize_and_back():
    async with kit() as server:
        asked = {"model": MODEL, "prompt": "hello", "return_token_strs": True}
        answer = await server.json("/tokenize", asked)
        assert answer["tokens"] == token_ids("hello")
        assert answer["count"] == 6
        assert answer["token_strs"][1:] == list("hello")
        bare = await server.json("/tokenize", {"prompt": "hello", "add_special_tokens": False})
        assert bare["tokens"] == token_ids("hello")[1:]
        chat = await server.json("/tokenize", {"messages": [{"role": "user", "content": "hi"}]})
        assert chat["tokens"] == token_ids("user: hi\nassistant: ")
        back = await server.json("/detokenize", {"model": MODEL, "tokens": bare["tokens"]})
        assert back == {"prompt": "hello"}


async def test_a_long_text_is_encoded_like_a_short_one():
    text = "abc " * 10_000
    async with kit() as server:
        answer = await server.json("/tokenize", {"prompt": text})
    assert answer["tokens"] == LetterTokenizer().encode(text)


async def test_the_tokenizers_own_words():
    async with kit() as server:
        info = await (await server.session.get(server.url + "/tokenizer_info")).json()
    assert (info["bos_token"], info["eos_token"], info["pad_token"]) == ("<s>", "</s>", None)
    assert info["chat_template"] == "the template's source"


async def test_the_version():
    async with kit() as server:
        answer = await (await server.session.get(server.url + "/version")).json()
    assert answer["version"].count(".") == 2


async def test_metrics_tell_what_is_preempted_and_moved():
    tight = Limits(
        page_size=4, num_pages=24, host_pages=400, max_slots=4, step_tokens=16, max_context=64
    )
    async with kit(limits=tight, policy="mlfq", delay_s=0.01) as server:
        asked = {"max_tokens": 40, "ignore_eos": True}
        bodies = [{**asked, "prompt": chr(97 + i) * 12} for i in range(12)]
        await asyncio.gather(*(server.json("/v1/completions", body) for body in bodies))
        await server.quiet()
        families, stats = await scrape(server), server.engine.stats()
    for name, expected in (
        ("num_preemptions", stats.preemptions),
        ("swap_out_pages", stats.pages_out),
        ("swap_in_pages", stats.pages_in),
        ("host_cache_hits", stats.host_hit_tokens),
    ):
        assert expected > 0, name
        assert value(families, name, f"{name}_total") == expected
    for way in ("out", "in"):
        pages = value(families, f"swap_{way}_pages", f"swap_{way}_pages_total")
        assert value(families, f"swap_{way}_bytes", f"swap_{way}_bytes_total") == 1024 * pages
    assert value(families, "host_cache_usage_perc") == stats.host_pages_used / 400
    assert value(families, "queue_level_requests", level="0") == 0
    assert families.keys() >= {
        f"fastserve:{name}"
        for name in (
            "swap_stall_seconds",
            "recomputed_tokens",
            "step_cost_error",
            "engine_busy_seconds",
        )
    }


async def test_metrics_show_what_the_default_policy_expects():
    async with kit(policy="adaptive") as server:
        await server.json("/v1/completions", {"prompt": "hello", "max_tokens": 10})
        await server.quiet()
        families = await scrape(server)
    assert 0 <= value(families, "length_prediction_error") <= 1
    assert value(families, "backlog_seconds") == 0
    assert [value(families, "queue_level_requests", level=str(n)) for n in range(3)] == [0, 0, 0]
