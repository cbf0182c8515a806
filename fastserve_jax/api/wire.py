"""JSON in and out, strictly by type. Every fault in the bytes becomes an InvalidRequest.

Knows nothing of any route.
"""

from __future__ import annotations

import re

import msgspec

from fastserve_jax.errors import FastServeError, InvalidRequest

_encoder = msgspec.json.Encoder()
_MISSING = re.compile(r"missing required field `(\w+)`")
_PATH = re.compile(r" - at `\$\.?([^`]*)`$")


class ErrorDetail(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(msgspec.Struct, frozen=True):
    error: ErrorDetail


def encode(value: object) -> bytes:
    """Compact UTF-8 JSON."""
    return _encoder.encode(value)


def decode[T](data: bytes | str, kind: type[T]) -> T:
    """Read one JSON value as `kind`; unknown fields are ignored, `true` is not an int.

    Raises InvalidRequest, its `param` naming the field at fault.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        message = str(error)
        raise InvalidRequest(message, param=_at_fault(message)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}", code="invalid_json") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply", code="invalid_json") from None


def error_answer(error: FastServeError) -> ErrorAnswer:
    return ErrorAnswer(ErrorDetail(error.message, error.type, error.param, error.code))


def _at_fault(message: str) -> str | None:
    """The dotted path of the field that `message`, msgspec's, complains of."""
    where, missing = _PATH.search(message), _MISSING.search(message)
    steps = [found.group(1) for found in (where, missing) if found]
    return ".".join(step for step in steps if step) or None
