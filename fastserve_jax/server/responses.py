"""/v1/responses over HTTP: create (whole or streamed), retrieve, delete."""

from __future__ import annotations

from contextlib import aclosing

from aiohttp import web

from fastserve_jax.api import sse, wire
from fastserve_jax.api.response_events import event_type
from fastserve_jax.api.responses import DeletedResponse, ResponseRequest
from fastserve_jax.errors import InvalidRequest
from fastserve_jax.server.exchange import OWNER, STATE, EventStream, json_answer, read_json
from fastserve_jax.server.response_job import ResponseJob, response_job
from fastserve_jax.server.store import Stored


async def create(request: web.Request) -> web.StreamResponse:
    asked = await read_json(request, ResponseRequest)
    job = await response_job(
        request.app[STATE],
        asked,
        request[OWNER],
        timeout_header=request.headers.get("X-Request-Timeout-Ms"),
    )
    if asked.stream:
        return await _stream(request, job)
    return json_answer(await job.run())


async def _stream(request: web.Request, job: ResponseJob) -> web.StreamResponse:
    async with EventStream(request) as out, aclosing(job.events()) as batches:
        async for batch in batches:
            await out.write(
                b"".join([sse.frame(wire.encode(event), event_type(event)) for event in batch])
            )
        return await out.end()


async def retrieve(request: web.Request) -> web.StreamResponse:
    return web.Response(body=_stored(request).body, content_type="application/json")


async def delete(request: web.Request) -> web.StreamResponse:
    _stored(request)
    response_id = request.match_info["id"]
    request.app[STATE].responses.drop(response_id)
    return json_answer(DeletedResponse(response_id))


def _stored(request: web.Request) -> Stored:
    stored = request.app[STATE].responses.get(request.match_info["id"], request[OWNER])
    if stored is None:
        missing = InvalidRequest("no response with this id is kept here", code="not_found")
        missing.status = 404
        raise missing
    return stored
