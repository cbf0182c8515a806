"""The part of streaming that chat and completions share: choices to chunks to the socket."""

from __future__ import annotations

from typing import Protocol

from aiohttp import web

from fastserve_jax.api import sse, wire
from fastserve_jax.errors import FastServeError
from fastserve_jax.server.choice import Choice
from fastserve_jax.server.exchange import EventStream
from fastserve_jax.server.job import Job


class Writer(Protocol):
    """Makes a route's chunks, as bytes ready to send; empty for nothing."""

    def opening(self) -> bytes: ...
    def piece(self, index: int, choice: Choice, text: str) -> bytes: ...
    def closing(self) -> bytes: ...


async def stream_job(request: web.Request, job: Job, writer: Writer) -> web.StreamResponse:
    """Raises what the engine raised, as long as nothing has been sent; after that the error is
    the stream's last event."""
    async with EventStream(request) as out:
        try:
            async with job.events() as events:
                async for batch in events:
                    data = b"".join([writer.piece(*shown) for shown in job.shown(events, batch)])
                    if not out.begun:
                        data = writer.opening() + data
                    if data:
                        await out.write(data)
            await out.write(writer.closing() + sse.DONE)
        except FastServeError as error:
            if not out.begun:
                raise
            await out.write(sse.frame(wire.encode(wire.error_answer(error))))
        return await out.end()
