"""The application: which route goes where. Everything else is in the handlers' modules."""

from __future__ import annotations

from aiohttp import web

from fastserve_jax.server import (
    chat,
    completions,
    embeddings,
    models,
    probes,
    responses,
    websocket,
)
from fastserve_jax.server.exchange import STATE
from fastserve_jax.server.middleware import SOCKET, keys_checked, outermost, stamp
from fastserve_jax.server.state import ServerState


def create_app(state: ServerState) -> web.Application:
    """An application over `state`; it answers at once and takes work after `state.ready`."""
    config = state.config
    app = web.Application(
        client_max_size=config.max_body_bytes,
        middlewares=[outermost, keys_checked(config.api_keys, config.allowed_hosts)],
    )
    app[STATE] = state
    app.on_response_prepare.append(stamp)
    app.add_routes(
        [
            web.get("/health", probes.health),
            web.get("/ready", probes.ready),
            web.get("/metrics", probes.metrics),
            web.get("/version", probes.version_),
            web.get("/v1/models", models.models),
            web.get("/v1/models/{id:.+}", models.model),
            web.post("/models/load", models.load),
            web.post("/models/unload", models.unload),
            web.post("/v1/load_lora_adapter", models.load_adapter),
            web.post("/v1/unload_lora_adapter", models.unload_adapter),
            web.post("/v1/completions", completions.complete),
            web.post("/v1/chat/completions", chat.chat),
            web.post("/v1/embeddings", embeddings.embed),
            web.post("/classify", embeddings.classify),
            web.post("/score", embeddings.score),
            web.post("/v1/responses", responses.create),
            web.get(SOCKET, websocket.connect, allow_head=False),
            web.get("/v1/responses/{id}", responses.retrieve),
            web.delete("/v1/responses/{id}", responses.delete),
            web.post("/tokenize", probes.tokenize),
            web.post("/detokenize", probes.detokenize),
            web.get("/tokenizer_info", probes.tokenizer_info),
        ]
    )
    return app
