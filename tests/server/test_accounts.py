"""Whose service a request counts as: the key's holder, the user it names, and its session."""

import pytest

from fastserve_jax.server.config import ServerConfig

from .kit import kit

KEYS = ServerConfig(api_keys=("first", "second"))
BODY = {"prompt": "abc", "max_tokens": 2}
CHAT = {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 2}


async def accounts_of(server, path, body, key=None):
    """(client, session) of the request that the engine was given."""
    seen = []
    submit = server.engine._scheduler.submit
    server.engine._scheduler.submit = lambda request, now: (
        seen.append((request.client, request.session)),
        submit(request, now),
    )
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with await server.post(path, body, headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        await answer.read()
    server.engine._scheduler.submit = submit
    return seen[0]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", BODY),
        ("/v1/chat/completions", CHAT),
        ("/v1/responses", {"input": "abc", "max_output_tokens": 2}),
    ],
)
async def test_nobody_in_particular_shares_with_nobody(path, body):
    async with kit() as server:
        assert await accounts_of(server, path, body) == ("", "")
        client, session = await accounts_of(server, path, body | {"user": "ann"})
        assert client
        assert not session
        assert await accounts_of(server, path, body | {"safety_identifier": "ann"}) == (client, "")
        assert (await accounts_of(server, path, body | {"user": "bob"}))[0] not in ("", client)


async def test_keys_tell_equal_users_apart_and_a_session_belongs_to_its_client():
    async with kit(KEYS) as server:
        asked = BODY | {"user": "ann", "session_id": "s"}
        first = await accounts_of(server, "/v1/completions", asked, "first")
        second = await accounts_of(server, "/v1/completions", asked, "second")
        assert first[0] != second[0]
        assert first[1] != second[1]
        alone = await accounts_of(server, "/v1/completions", BODY, "first")
        assert alone[0] not in ("", first[0])
        assert "first" not in "".join(first)  # a digest stands for the key


async def test_a_session_without_user_or_key_is_an_account_of_its_own():
    async with kit() as server:
        client, session = await accounts_of(server, "/v1/completions", BODY | {"session_id": "s"})
        assert not client
        assert session
