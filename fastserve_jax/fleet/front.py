"""The fleet's address: every request goes to one replica, and to another if it was never answered.

A replica that is gone, or stops, or cannot take it now, is passed over, and another asked. What
goes on from a stored response goes where that is. Knows addresses and HTTP, nothing of Ray.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Self

from aiohttp import web

from fastserve_jax.core.routing import Router
from fastserve_jax.errors import FastServeError, Overloaded
from fastserve_jax.server.config import ServerConfig
from fastserve_jax.server.exchange import error_answer, read_body

from .beginnings import BLOCK_TOKENS, Beginnings, beginnings
from .numbers import CONTENT_TYPE_LATEST, text_of
from .peer import NotAnsweredError, Peer
from .relay import RESPONSES, Relay

MOST_TRIES = 3
WAIT_S = 30.0  # for any replica to be there, before a client is told that there is none
MOST_WAITING = 1024  # requests, for that
MOST_RESPONSES = 1 << 16  # of which it is known where they are


class Front:
    """Use as `async with`. `peers` are the replicas that are ready, by name."""

    def __init__(self, router: Router, config: ServerConfig) -> None:
        self.router = router
        self.peers: dict[str, Peer] = {}
        self.asked = self.retried = self.refused = 0
        self._config = config
        self._relay = Relay(config, self._made)
        self._homes: OrderedDict[str, str] = OrderedDict()  # of responses
        self._changed = asyncio.Event()
        self._waiting = 0
        self._is_stopping = False

    async def __aenter__(self) -> Self:
        await self._relay.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._relay.__aexit__()

    @property
    def cut_off(self) -> int:
        return self._relay.cut_off

    @property
    def in_flight(self) -> int:
        return sum(peer.in_flight for peer in self.peers.values())

    def add(self, name: str, url: str) -> None:
        self.peers[name] = Peer(name, url)
        self.router.add(name)
        self._tell()

    def remove(self, name: str, *, is_lost: bool) -> None:
        """Takes no new requests; those that it has may end, unless it is lost. Unknown ones are
        ignored."""
        peer = self.peers.pop(name, None)
        self.router.remove(name)
        if peer is not None and is_lost:
            peer.lose()

    def stop(self) -> None:
        """New requests are refused, and those that wait for a replica."""
        self._is_stopping = True
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _made(self, response: str, name: str) -> None:
        self._homes[response] = name
        if len(self._homes) > MOST_RESPONSES:
            self._homes.popitem(last=False)

    def app(self) -> web.Application:
        app = web.Application(client_max_size=self._config.max_body_bytes)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._ready)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_route("*", "/{path:.*}", self._handle)
        return app

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _ready(self, _: web.Request) -> web.Response:
        is_ready = bool(self.peers) and not self._is_stopping
        return web.json_response({"replicas": len(self.peers)}, status=200 if is_ready else 503)

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=text_of(self), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.asked += 1
        try:
            return await self._answer(request, await read_body(request, self._config))
        except FastServeError as error:
            self.refused += isinstance(error, Overloaded)
            return error_answer(error)
        except ConnectionError:
            return web.Response(status=499)  # nobody is left to read it

    async def _answer(self, request: web.Request, body: bytes) -> web.StreamResponse:
        """Raises Overloaded where no replica says anything."""
        asked = beginnings(body)
        home = self._homes.get(asked.follows or request.path.removeprefix(f"{RESPONSES}/"))
        without: list[str] = []
        last: web.StreamResponse | None = None
        why = "no replica is ready"
        while len(without) < MOST_TRIES:
            if self._is_stopping:
                raise Overloaded("the server is shutting down", retry_after_s=5)
            peer = self._peer(asked, home, without)
            if peer is None:
                if last is not None or not await self._another(without):
                    break
                continue
            peer.in_flight += 1
            try:
                return await self._relay.exchange(request, peer, body)
            except NotAnsweredError as error:
                self.retried += 1
                without.append(peer.name)
                why = f"{peer.name} did not answer: {error}"
                last = error.answer or last
                if error.answer is not None and peer.name == home:
                    break  # the others would say that there is no such response
            finally:
                peer.in_flight -= 1
                self.router.ended(peer.name, asked.tokens)
        if last is None:
            raise Overloaded(f"{why}: try again later", retry_after_s=5)
        self.refused += 1
        return last

    def _peer(self, asked: Beginnings, home: str | None, without: list[str]) -> Peer | None:
        if home in self.peers and home not in without:
            without = [name for name in self.peers if name != home]
        name = self.router.route(asked.names, asked.tokens, BLOCK_TOKENS, without)
        return None if name is None else self.peers[name]

    async def _another(self, without: list[str]) -> bool:
        """Waits until there is a replica but those `without`, for a while."""
        if self._waiting >= MOST_WAITING:
            return False
        self._waiting += 1
        try:
            async with asyncio.timeout(WAIT_S):
                while not self._is_stopping and self.peers.keys() <= set(without):
                    await self._changed.wait()
        except TimeoutError:
            return False
        finally:
            self._waiting -= 1
        return True
