"""What happens around every handler: ids, keys, and every fault in one JSON shape.

Never logs what a client sent or was sent.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.typedefs import Middleware

from fastserve_jax.errors import FastServeError, InvalidRequest, Unauthorized
from fastserve_jax.server.exchange import OWNER, REQUEST_ID, STATE, error_answer, send_whole
from fastserve_jax.server.state import Phase, ServerState

PROBES = frozenset({"/health", "/ready", "/metrics"})
SOCKET = "/v1/responses"  # with GET

_log = logging.getLogger(__name__)
_access_log = logging.getLogger("fastserve_jax.access")
_GIVEN_ID = re.compile(r"[\x21-\x7e]{1,128}")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def outermost(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Names the request, counts it as work, answers its faults, writes the access line."""
    state = request.app[STATE]
    given = request.headers.get("X-Request-Id", "")
    request[REQUEST_ID] = given if _GIVEN_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
    start = time.perf_counter()
    status = 499  # the client went away first
    try:
        if request.path in PROBES or _wants_socket(request):
            answer = await _answered(request, handler)
        else:
            with state.work():
                answer = await _answered(request, handler)
        status = answer.status
        return answer
    finally:
        if state.config.access_log:
            elapsed_ms = (time.perf_counter() - start) * 1000
            _access_log.info(
                "%s %s %s %d %.1fms",
                *(request[REQUEST_ID], request.method, request.rel_url.raw_path),
                *(status, elapsed_ms),
            )


def _wants_socket(request: web.Request) -> bool:
    """Each of its responses counts by itself. Whoever says so elsewhere is not believed."""
    is_upgrade = request.headers.get("Upgrade", "").lower() == "websocket"
    return is_upgrade and (request.method, request.path) == ("GET", SOCKET)


async def _answered(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        answer = await handler(request)
    except FastServeError as error:
        if request.path not in PROBES:
            _count(request.app[STATE], error)
        answer = error_answer(error)
    except web.HTTPException as error:
        answer = _http_fault(request, error)
    except ConnectionError:
        return web.Response(status=499)  # nobody is left to read it
    except Exception:
        _log.exception("request %s failed", request[REQUEST_ID])
        answer = error_answer(FastServeError("the server failed on this request"))
    if answer.prepared:
        return answer
    try:
        return await send_whole(request, answer)
    except ConnectionError:
        return answer


def _count(state: ServerState, error: FastServeError) -> None:
    if error.status in (429, 503):
        reason = "queue_full" if state.phase is Phase.READY else state.phase.value
        state.metrics.rejected[reason] += 1


def _http_fault(request: web.Request, fault: web.HTTPException) -> web.Response:
    messages = {
        404: (f"there is no route {request.method} {request.path[:200]}", "not_found"),
        405: (f"{request.path[:200]} does not take {request.method}", "method_not_allowed"),
        413: ("the body is too large", "request_too_large"),
    }
    message, code = messages.get(fault.status, (fault.reason, None))
    error = InvalidRequest(message, code=code)
    error.status = fault.status
    answer = error_answer(error)
    if "Allow" in fault.headers:
        answer.headers["Allow"] = fault.headers["Allow"]
    return answer


def keys_checked(api_keys: tuple[str, ...], allowed_hosts: tuple[str, ...]) -> Middleware:
    """A middleware that lets only the holders of a key past, except to the probes."""
    digests = [hashlib.sha256(key.encode()).digest() for key in api_keys]

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path in PROBES:
            return await handler(request)
        if allowed_hosts and request.url.host not in allowed_hosts:
            raise InvalidRequest("this Host is not served here", code="invalid_host")
        request[OWNER] = ""
        if digests:
            scheme, _, key = request.headers.get("Authorization", "").partition(" ")
            given = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
            known = [hmac.compare_digest(given, digest) for digest in digests]
            if scheme.lower() != "bearer" or not any(known):
                raise Unauthorized("give a valid key as Authorization: Bearer KEY")
            request[OWNER] = given.hex()
        return await handler(request)

    return check


async def stamp(request: web.Request, answer: web.StreamResponse) -> None:
    """For on_response_prepare: the request's id, and an end to the connection while draining."""
    answer.headers["X-Request-Id"] = request.get(REQUEST_ID, "")
    answer.headers["X-Content-Type-Options"] = "nosniff"
    if request.app[STATE].draining.is_set() and answer.status != 101:
        answer.headers["Connection"] = "close"
        answer.force_close()
