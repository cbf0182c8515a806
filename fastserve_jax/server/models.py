"""/v1/models: what is served; /models/load and /models/unload: what else is to be, and what not;
/v1/load_lora_adapter and /v1/unload_lora_adapter: the same of adapters, as vLLM has them.

All but the first are closed unless `server.loading` is set: what they load is read from this
machine.
"""

from __future__ import annotations

from aiohttp import web

from fastserve_jax.api.models import (
    AdapterLoading,
    AdapterUnloading,
    Loading,
    ModelCard,
    ModelList,
    Unloaded,
    Unloading,
)
from fastserve_jax.errors import InvalidRequest, ModelNotFound, OperatorError
from fastserve_jax.server.exchange import STATE, json_answer, read_json
from fastserve_jax.server.served import Adapters, Entry, Served
from fastserve_jax.server.state import Roster, ServerState


def _card(served: Entry) -> ModelCard:
    card = ModelCard(served.name, served.created, max_model_len=served.context)
    card.root = served.root or served.name
    if isinstance(served, Served) and served.parent:
        card.parent = served.parent
    return card


async def models(request: web.Request) -> web.StreamResponse:
    return json_answer(ModelList([_card(served) for served in request.app[STATE].models]))


async def model(request: web.Request) -> web.StreamResponse:
    return json_answer(_card(request.app[STATE].named(request.match_info["id"])))


async def load(request: web.Request) -> web.StreamResponse:
    """Answers when it is served, or says why it cannot be; then all is as it was."""
    state = request.app[STATE]
    asked = await read_json(request, Loading)
    roster = _roster(state)
    try:
        return json_answer(_card(await roster.load(asked.model, asked.name)))
    except OperatorError as error:
        raise InvalidRequest(error.message, param="model", code="cannot_load") from error


async def unload(request: web.Request) -> web.StreamResponse:
    """Answers when it has no new requests; those that it has are finished."""
    state = request.app[STATE]
    asked = await read_json(request, Unloading)
    roster = _roster(state)
    served = state.named(asked.model)
    if isinstance(served, Served) and served.adapter is not None:
        _adapters(state.model(served.parent)).unload(asked.model)
    else:
        await roster.unload(asked.model)
    return json_answer(Unloaded(asked.model))


async def load_adapter(request: web.Request) -> web.StreamResponse:
    """Answers when requests may name it, or says why not; then all is as it was."""
    state = request.app[STATE]
    asked = await read_json(request, AdapterLoading)
    _roster(state)
    base = state.model(asked.base_model_name)
    if not asked.lora_name or not asked.lora_path:
        raise InvalidRequest("Both 'lora_name' and 'lora_path' must be provided.")
    if any(own.name == asked.lora_name for own in state.models):
        raise InvalidRequest(
            f"The lora adapter '{asked.lora_name}' has already been loaded.", param="lora_name"
        )
    try:
        await _adapters(base).load(asked.lora_name, asked.lora_path)
    except OperatorError as error:
        raise InvalidRequest(error.message, param="lora_path", code="cannot_load") from error
    return web.Response(text=f"Success: LoRA adapter '{asked.lora_name}' added successfully.")


async def unload_adapter(request: web.Request) -> web.StreamResponse:
    """Answers when new requests are refused; those that it has are finished."""
    state = request.app[STATE]
    name = (await read_json(request, AdapterUnloading)).lora_name
    _roster(state)
    for own in state.models:
        if isinstance(own, Served) and own.name == name and own.adapter is not None:
            _adapters(state.model(own.parent)).unload(name)
            return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")
    raise ModelNotFound(f"The lora adapter '{name[:100]}' cannot be found.", param="lora_name")


def _adapters(served: Served) -> Adapters:
    if served.adapters is None:
        of = f"{served.name} is an adapter" if served.adapter else f"{served.name} has no room"
        raise InvalidRequest(
            f"{of}: adapters are loaded beside a model that was started with room for them "
            "(--set lora.max_adapters=N)"
        )
    return served.adapters


def _roster(state: ServerState) -> Roster:
    """Raises what `models` of the state does, and InvalidRequest where what is served stays."""
    state.models  # noqa: B018
    if state.config.loading and state.roster is not None:
        return state.roster
    fault = InvalidRequest(
        "models cannot be loaded over HTTP here: start it with --set server.loading=true"
        if state.roster is not None
        else "models cannot be loaded into a group of hosts",
        code="loading_is_off",
    )
    fault.status = 403
    raise fault
