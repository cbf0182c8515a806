"""/v1/models: what is served; /models/load and /models/unload: what else is to be, and what not.

The last two are closed unless `server.loading` is set: what they load is read from this machine.
"""

from __future__ import annotations

from aiohttp import web

from fastserve_jax.api.models import Loading, ModelCard, ModelList, Unloaded, Unloading
from fastserve_jax.errors import InvalidRequest, OperatorError
from fastserve_jax.server.exchange import STATE, json_answer, read_json
from fastserve_jax.server.served import Entry
from fastserve_jax.server.state import Roster, ServerState


def _card(served: Entry) -> ModelCard:
    root = served.root or served.name
    return ModelCard(served.name, served.created, root=root, max_model_len=served.context)


async def models(request: web.Request) -> web.StreamResponse:
    return json_answer(ModelList([_card(served) for served in request.app[STATE].models]))


async def model(request: web.Request) -> web.StreamResponse:
    return json_answer(_card(request.app[STATE].named(request.match_info["id"])))


async def load(request: web.Request) -> web.StreamResponse:
    """Answers when it is served, or says why it cannot be; then all is as it was."""
    state = request.app[STATE]
    roster = _roster(state)
    asked = await read_json(request, Loading)
    state.models  # noqa: B018  (raises while no work is taken)
    try:
        return json_answer(_card(await roster.load(asked.model, asked.name)))
    except OperatorError as error:
        raise InvalidRequest(error.message, param="model", code="cannot_load") from error


async def unload(request: web.Request) -> web.StreamResponse:
    """Answers when it has no new requests; those that it has are finished."""
    state = request.app[STATE]
    roster = _roster(state)
    asked = await read_json(request, Unloading)
    state.named(asked.model)
    await roster.unload(asked.model)
    return json_answer(Unloaded(asked.model))


def _roster(state: ServerState) -> Roster:
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
