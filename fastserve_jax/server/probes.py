"""The small routes: health, ready, metrics, version, and the tokenizer's."""

from __future__ import annotations

from importlib.metadata import version

from aiohttp import web

from fastserve_jax.api.chat import turn
from fastserve_jax.api.models import (
    DetokenizeAnswer,
    DetokenizeRequest,
    Health,
    TokenizeAnswer,
    TokenizeRequest,
    TokenizerInfo,
    Version,
)
from fastserve_jax.api.sampling import check_ids
from fastserve_jax.errors import EngineFailed, InvalidRequest, Overloaded
from fastserve_jax.metrics import CONTENT_TYPE
from fastserve_jax.server.exchange import STATE, json_answer, read_json
from fastserve_jax.server.job import encode_chat, encode_text
from fastserve_jax.server.state import Phase


async def health(request: web.Request) -> web.StreamResponse:
    """Live: the process answers. 500 once the engine has failed for good."""
    state = request.app[STATE]
    if state.failed:
        raise EngineFailed("the engine has stopped; the server must be restarted")
    return json_answer(Health("ok"))


async def ready(request: web.Request) -> web.StreamResponse:
    """200 when work is taken; 503 while loading, draining or failed."""
    state = request.app[STATE]
    if state.failed or state.phase is not Phase.READY:
        phase = "failed" if state.failed else state.phase.value
        raise Overloaded(f"not ready: {phase}", retry_after_s=5)
    return json_answer(Health("ready"))


async def metrics(request: web.Request) -> web.StreamResponse:
    body = request.app[STATE].metrics.render()
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})


async def version_(request: web.Request) -> web.StreamResponse:
    return json_answer(Version(version("fastserve-jax")))


async def tokenize(request: web.Request) -> web.StreamResponse:
    asked = await read_json(request, TokenizeRequest)
    served = request.app[STATE].model(asked.model)
    if (asked.prompt is None) == (asked.messages is None):
        raise InvalidRequest("give either prompt or messages", param="prompt")
    if asked.messages is not None:
        turns = [turn(m, f"messages[{i}]") for i, m in enumerate(asked.messages)]
        opens_turn = asked.add_generation_prompt is not False
        tokens = await encode_chat(served, turns, None, opens_turn)
    else:
        assert asked.prompt is not None
        tokens = await encode_text(served, asked.prompt, asked.add_special_tokens is not False)
    answer = TokenizeAnswer(tokens, len(tokens), served.context)
    if asked.return_token_strs:
        answer.token_strs = [served.tokenizer.token_text(t) for t in tokens]
    return json_answer(answer)


async def detokenize(request: web.Request) -> web.StreamResponse:
    asked = await read_json(request, DetokenizeRequest)
    served = request.app[STATE].model(asked.model)
    check_ids(asked.tokens, served.tokenizer.vocab_size, "tokens")
    skip_special = asked.skip_special_tokens is True
    return json_answer(DetokenizeAnswer(served.tokenizer.decode(asked.tokens, skip_special)))


async def tokenizer_info(request: web.Request) -> web.StreamResponse:
    served = request.app[STATE].model(None)
    tokenizer = served.tokenizer
    return json_answer(
        TokenizerInfo(
            bos_token=tokenizer.named_tokens.get("bos_token"),
            eos_token=tokenizer.named_tokens.get("eos_token"),
            pad_token=tokenizer.named_tokens.get("pad_token"),
            chat_template=tokenizer.chat_template,
            vocab_size=tokenizer.vocab_size,
            max_model_len=served.context,
        )
    )
