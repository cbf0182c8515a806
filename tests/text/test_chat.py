"""Conversations to prompts: what templates see, and that only they write control tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve_jax.errors import InvalidRequest
from fastserve_jax.text.chat import ChatTemplate
from fastserve_jax.text.load import load_tokenizer
from fastserve_jax.text.tokenizer import Tokenizer
from fastserve_jax.weights.gguf import GgufFile
from tests.text import vocabularies
from tests.text.vocabularies import CONTROL


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return load_tokenizer(vocabularies.byte_level_metadata())


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    return load_tokenizer(vocabularies.sentencepiece_metadata())


def _user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def test_a_conversation(byte_level: Tokenizer) -> None:
    chat = ChatTemplate(byte_level)
    messages = [*_user("hi"), {"role": "assistant", "content": "hello"}, *_user("bye")]
    text = chat.render(messages)
    assert text == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
        "<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n"
    )
    library = vocabularies.byte_level()  # which finds control tokens in text by itself
    assert chat.encode(messages) == library.encode(text).ids
    assert not chat.render(messages, add_generation_prompt=False).endswith("assistant\n")


def _controls(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [id for id in ids if tokenizer.is_control(id)]


_HOSTILE = st.lists(
    st.one_of(
        st.sampled_from(
            [
                *CONTROL,
                "<|im_",
                "end|>",
                "<",
                "|",
                ">",
                "<|im_end|",
                "</s>",
                "<s>",
                " ",
                "\n",
                "\ue000",
            ]
        ),
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=3),
    ),
    max_size=8,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(role=_HOSTILE, content=_HOSTILE, parts=st.lists(_HOSTILE, max_size=3), final=_HOSTILE)
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_user_text_never_becomes_a_control_token(
    byte_level: Tokenizer,
    sentencepiece: Tokenizer,
    kind: str,
    role: str,
    content: str,
    parts: list[str],
    final: str,
) -> None:
    tokenizer = byte_level if kind == "byte_level" else sentencepiece
    # Trimmed and glued together without a gap, so that pieces could complete each other.
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content | trim }}"
        "{% for x in m.extra %}{{ x }}{% endfor %}{{ m.final }}<|im_end|>{% endfor %}"
    )
    chat = ChatTemplate(tokenizer, source)
    message = {"role": role, "content": content, "extra": parts, "final": final}
    ids = chat.encode([message])
    ours = [tokenizer.control_texts[text] for text in ("<|im_start|>", "<|im_end|>")]
    assert _controls(tokenizer, ids) == ([1] if tokenizer.add_bos else []) + ours
    text = role + content.strip() + "".join(parts) + final
    assert chat.render([message]) == f"<|im_start|>{text}<|im_end|>"
    start, end = ids.index(ours[0]) + 1, len(ids) - 1
    assert ids[start:end] == tokenizer.encode(text, add_special=False)  # the usual tokens


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("<|im_end|", ">"),
        ("<|im_end|  \n", ">"),  # trimmed by the template
        ("<|im_e", "nd|>"),
        ("<", "|im_end|>"),
        ("<|IM_END|>", ""),  # lowered by the template
        ("<|IM_", "END|>"),
        ("<|im_<|im_", "end|>"),
    ],
)
def test_a_template_that_changes_text_makes_no_control_token_of_it(
    byte_level: Tokenizer, first: str, second: str
) -> None:
    source = "{% for m in messages %}{{ m.content | trim | lower }}{% endfor %}"
    messages = [*_user(first), *_user(second)]
    chat = ChatTemplate(byte_level, source)
    assert _controls(byte_level, chat.encode(messages)) == []
    assert chat.render(messages) == (first.strip() + second).lower()


def test_every_beginning_at_the_end_is_broken() -> None:
    metadata = vocabularies.byte_level_metadata()
    metadata["tokenizer.ggml.tokens"][:2] = ["<<x>", "<x>"]
    tokenizer = load_tokenizer(metadata)
    chat = ChatTemplate(tokenizer, "{% for m in messages %}{{ m.content }}{% endfor %}<<x>")
    ids = chat.encode([*_user("<<"), *_user("x>")])
    assert _controls(tokenizer, ids) == [0]


def test_text_in_tools_and_calls_is_text_too(byte_level: Tokenizer) -> None:
    source = (
        "{{ tools | tojson }}{% for m in messages %}{% for c in m.tool_calls %}"
        "{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}<|im_end|>"
    )
    chat = ChatTemplate(byte_level, source)
    call = {"function": {"name": "f", "arguments": '{"a<|im_end|>": ["ü<|im_start|>"]}'}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    tools = [{"function": {"name": "<|im_end|>"}}]
    ids = chat.encode(messages, tools=tools)
    assert _controls(byte_level, ids) == [2]
    assert byte_level.decode(ids, skip_special=False) == (
        '[{"function": {"name": "<|im_end|>"}}]{"a<|im_end|>": ["ü<|im_start|>"]}<|im_end|>'
    )


def test_what_clients_send_is_shaped_for_templates(byte_level: Tokenizer) -> None:
    source = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    chat = ChatTemplate(byte_level, source)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    given = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None},
        {"role": "x"},
    ]
    assert chat.render(given) == "[a\nb][][]"
    assert given[0]["content"] is parts  # what was given is not changed
    with pytest.raises(InvalidRequest, match="only have text parts"):
        chat.render([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])


def test_arguments_that_are_no_json_stay_text(byte_level: Tokenizer) -> None:
    chat = ChatTemplate(byte_level, "{{ messages[0].tool_calls[0].function.arguments }}")
    call = {"function": {"name": "f", "arguments": "{broken"}}
    assert chat.render([{"role": "assistant", "tool_calls": [call]}]) == "{broken"


def test_named_tokens_are_the_vocabularys(sentencepiece: Tokenizer) -> None:
    chat = ChatTemplate(sentencepiece, "{{ bos_token }}x{{ eos_token }}")
    assert chat.render(_user("a")) == "<s>x</s>"
    ids = chat.encode(_user("a"))
    assert (ids[0], ids[-1], ids.count(1)) == (1, 2, 1)


def test_bos_is_added_where_the_template_has_none(sentencepiece: Tokenizer) -> None:
    assert ChatTemplate(sentencepiece, "x").encode(_user("a"))[0] == 1


def test_models_without_a_template_get_lines(sentencepiece: Tokenizer) -> None:
    metadata = vocabularies.sentencepiece_metadata()
    del metadata["tokenizer.chat_template"]
    chat = ChatTemplate(load_tokenizer(metadata))
    messages = [{"role": "system", "content": "Be brief."}, *_user("hi")]
    assert chat.render(messages) == "System: Be brief.\nUser: hi\nAssistant:"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate\nsecond line') }}", "roles must alternate$"),
        ("{{ messages[0].nope.deeper }}", "does not take these messages: .*nope"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 'a' * 9 }}", "repetition is not allowed"),
        ("{% for", "this model's chat template cannot be used: "),
        ("{{ x | attr('y') }}", "cannot be used: No filter named 'attr'"),
        ("x" * 300_000, "cannot be used: longer than"),
    ],
)
def test_templates_that_fail_blame_the_request(
    byte_level: Tokenizer, source: str, reason: str
) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        ChatTemplate(byte_level, source).render(_user("a"))


def test_messages_that_cannot_be(byte_level: Tokenizer) -> None:
    chat = ChatTemplate(byte_level)
    with pytest.raises(InvalidRequest, match="must not be empty"):
        chat.encode([])
    with pytest.raises(InvalidRequest, match="lone surrogate"):
        chat.encode(_user("\ud800"))
    deep: Any = "x"
    for _ in range(50):
        deep = [deep]
    with pytest.raises(InvalidRequest, match="nest deeper"):
        chat.encode([{"role": "user", "content": "a", "extra": deep}])
    every = "".join(map(chr, range(0xE000, 0xF900)))
    with pytest.raises(InvalidRequest, match="private-use"):
        chat.encode(_user(every))


@pytest.mark.model
def test_the_default_model_keeps_its_own_system_prompt(
    model_path: Callable[[str], Path],
) -> None:
    metadata = GgufFile(model_path("smollm2-135m-instruct")).metadata
    chat = ChatTemplate(load_tokenizer(metadata))
    assert chat.render(_user("hi")) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = chat.encode([{"role": "system", "content": "x"}, *_user("<|im_end|>")])
    assert [id for id in ids if id < 3] == [1, 2, 1, 2, 1]
