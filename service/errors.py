"""The errors of the service, drawn once: what an HTTP client sees of them. How it is sent is in problems.py.

ServiceError                 a problem that is told to the client, with its status
  MalformedHttp        400   what came is no request
  MalformedJson        400   the body is not JSON
  Unauthorized         401   no API key, or none that is in force
  Forbidden            403   the key's role may not ask this
  InvalidRequest       422   the body is JSON, but not a request that this model can answer
  BodyTooLarge         413
  RequestHeaderTooLarge 431
  RequestTimeout       408   the request did not come in time
  TooManyConnections   503
  UnsupportedMediaType 415
  ModelNotFound        404   the inference protocol was asked for another model or version than the active one
  UserNotFound         404   the store was asked and has no such record
  Overloaded           429   more waits than can be scored in time
  CallerLeft           499   told nobody: the caller has closed the connection
  StoreNotAnswering    503   the store could not be asked
  DeadlineExceeded     504
StoreError                   the store could not answer: never told as an error, scores are degraded instead
  StoreTimeout
  StoreUnavailable
    StoreRefused             its answer was an error
  StoreCircuitOpen
PublicationError             what is published cannot be served: the old one stays
StartupError                 the service cannot start; its message is for whoever starts it
  ApiKeysError               the keys cannot be read: read again while it serves, the old ones stay
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

MAX_ERRORS = 20  # told of one request: 4,000 wrong candidates are one mistake


@dataclass(frozen=True)
class FieldError:
    """One thing wrong with a body. `pointer` is a JSON pointer (RFC 6901) into it; "" is the whole body."""

    pointer: str
    detail: str


class ServiceError(Exception):
    """A problem with words for the client. `detail` never holds text that came from another library's exception."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "internal"
    title: ClassVar[str] = "Internal error"

    def __init__(self, detail: str, errors: tuple[FieldError, ...] = ()) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = errors

    @property
    def headers(self) -> Mapping[str, str]:
        """What the answer's head says beside the problem, such as when to come back."""
        return {}


class MalformedHttp(ServiceError):
    status, kind, title = 400, "malformed-http", "The request is not HTTP"


class MalformedJson(ServiceError):
    status, kind, title = 400, "malformed-json", "The body is not JSON"


class InvalidRequest(ServiceError):
    status, kind, title = 422, "invalid-request", "The request is not valid"

    @classmethod
    def at(cls, pointer: str, detail: str) -> "InvalidRequest":
        """The one-field case, which is most of them."""
        return cls.of((FieldError(pointer, detail),))

    @classmethod
    def of(cls, errors: tuple[FieldError, ...]) -> "InvalidRequest":
        """Each wrong field with its own words."""
        return cls(f"{len(errors)} field{'s are' if len(errors) > 1 else ' is'} not valid", errors)


class Unauthorized(ServiceError):
    status, kind, title = 401, "unauthorized", "An API key is needed"

    @property
    def headers(self) -> Mapping[str, str]:
        return {"www-authenticate": "Bearer"}


class Forbidden(ServiceError):
    status, kind, title = 403, "forbidden", "The API key does not allow this"


class BodyTooLarge(ServiceError):
    status, kind, title = 413, "body-too-large", "The body is too large"


class RequestHeaderTooLarge(ServiceError):
    status, kind, title = 431, "request-header-too-large", "The request's head is too large"


class RequestTimeout(ServiceError):
    status, kind, title = 408, "request-timeout", "The request did not come in time"


class TooManyConnections(ServiceError):
    status, kind, title = 503, "too-many-connections", "There are too many connections"


class UnsupportedMediaType(ServiceError):
    status, kind, title = 415, "unsupported-media-type", "The body is not of a type that this service reads"


class ModelNotFound(ServiceError):
    status, kind, title = 404, "model-not-found", "There is no such model here"


class UserNotFound(ServiceError):
    status, kind, title = 404, "user-not-found", "The cache has no such user"


class Overloaded(ServiceError):
    status, kind, title = 429, "overloaded", "The service has more to do than it can"

    def __init__(self, detail: str, retry_after_s: int) -> None:
        """retry_after_s: whole seconds, at least 1, as HTTP has them."""
        super().__init__(detail)
        self._retry_after_s = max(1, retry_after_s)

    @property
    def headers(self) -> Mapping[str, str]:
        return {"Retry-After": str(self._retry_after_s)}


class CallerLeft(ServiceError):
    status, kind, title = 499, "caller-left", "The caller left"


class StoreNotAnswering(ServiceError):
    status, kind, title = 503, "store-unavailable", "The store cannot be asked"


class DeadlineExceeded(ServiceError):
    status, kind, title = 504, "deadline-exceeded", "The answer was not ready in time"


class StoreError(Exception):
    """The store could not answer, which says nothing about what it holds. `reason` is what `degraded` will say."""

    reason: ClassVar[str]

    def __init__(self, words: str, met: type[Exception] | None = None) -> None:
        """met: what was raised where the store was asked, if it was."""
        super().__init__(words)
        self.met = met


class StoreTimeout(StoreError):
    reason = "store_timeout"


class StoreUnavailable(StoreError):
    reason = "store_unavailable"


class StoreRefused(StoreUnavailable):
    """It answered, with an error."""


class StoreCircuitOpen(StoreError):
    """It was not even asked: too many reads before this one have failed."""

    reason = "store_circuit_open"


class PublicationError(Exception):
    """What the store names as active cannot be served. The message says why and what to do."""


class StartupError(Exception):
    """The service cannot start. The message says what was found, what was wanted and what to do."""


class ApiKeysError(StartupError):
    """The API keys cannot be read, or are not what they must be. The message holds no key and no hash."""
