"""Every error a person can meet, in one tree. Each knows its HTTP status and says what to do.

    FastServeError              500  server_error
    ├─ InvalidRequest           400  invalid_request_error   (param names the field)
    │  ├─ ModelNotFound         404  model_not_found
    │  ├─ Unauthorized          401  invalid_api_key
    │  ├─ BodyTooLarge          413  request_too_large
    │  └─ UnsupportedMedia      415  unsupported_media_type
    ├─ Overloaded               503  server_overloaded       (retry_after_s)
    │  └─ RateLimited           429  rate_limit_exceeded
    ├─ DeadlineExceeded         504  deadline_exceeded
    ├─ EngineFailed             500  engine_failed
    └─ OperatorError            what the person at the terminal can mend; never leaves it
       ├─ ModelFileError        a model's files: unknown, damaged, incomplete
       ├─ PullFailed            a download: no network, wrong hash, no space
       ├─ DataError             text to train on, or a prepared folder: unreadable, unfinished
       ├─ TrainingFailed        nats that are none, a disk that is full; what was good is kept
       ├─ ConfigError           a setting: unknown key, wrong type, out of range
       ├─ DoesNotFit            memory: what would fit is in the message
       └─ GroupLost             another host of the group: gone, or never there

Our own bugs are `assert`s, not members of this tree. Imports nothing.
"""

from __future__ import annotations


class FastServeError(Exception):
    """Root of the tree. `param` names the request field at fault, if one is."""

    status = 500
    type = "server_error"
    code: str | None = None
    retry_after_s: float | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class InvalidRequest(FastServeError):
    status = 400
    type = "invalid_request_error"


class ModelNotFound(InvalidRequest):
    status = 404
    code = "model_not_found"


class Unauthorized(InvalidRequest):
    status = 401
    code = "invalid_api_key"


class BodyTooLarge(InvalidRequest):
    status = 413
    code = "request_too_large"


class UnsupportedMedia(InvalidRequest):
    status = 415
    code = "unsupported_media_type"


class Overloaded(FastServeError):
    """Nothing is wrong with the request: the server cannot take it now."""

    status = 503
    type = "overloaded_error"
    code = "server_overloaded"

    def __init__(
        self, message: str, *, retry_after_s: float = 1.0, param: str | None = None
    ) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s


class RateLimited(Overloaded):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class DeadlineExceeded(FastServeError):
    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


class EngineFailed(FastServeError):
    """The engine stopped, or this request's numbers went bad; `__cause__` says why."""

    code = "engine_failed"


class OperatorError(FastServeError):
    """Shown as one line at the terminal, which ends with `exit_status`."""

    exit_status = 2


class ModelFileError(OperatorError):
    pass


class PullFailed(OperatorError):
    pass


class DataError(OperatorError):
    pass


class TrainingFailed(OperatorError):
    pass


class ConfigError(OperatorError):
    pass


class DoesNotFit(OperatorError):
    pass


class GroupLost(OperatorError):
    """Ends every host of a group: whoever started it should do so again."""

    exit_status = 3
