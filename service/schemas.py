"""The JSON that goes in and out, field by field. Strict: no type is guessed from another, no unknown field is ignored.

What depends on the model or on a setting (the kind of the ids, the columns, how many candidates) is checked in
prepare.py. docs/service.md describes every field; a test holds the two together.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from model.identifiers import INT64_MAX, INT64_MIN, Id

T = TypeVar("T")
MAX_COLUMNS = 256
MAX_STRING = 1024  # characters: of an id, of a column's name and value, of a text of the protocol


class Says:
    """One message for a union, in place of one per branch: a wrong id is one mistake, not two."""

    def __init__(self, message: str) -> None:
        self.message = message

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.custom_error_schema(
            handler(source), custom_error_type="wrong_type", custom_error_message=self.message
        )


_Int64 = Annotated[int, Field(ge=INT64_MIN, le=INT64_MAX)]
_Text = Annotated[str, Field(max_length=MAX_STRING)]
_AnyId = Annotated[
    _Int64 | Annotated[_Text, Field(min_length=1)],
    Says(f"must be a 64-bit integer or a non-empty string of at most {MAX_STRING} characters"),
]
_Category = Annotated[
    _Int64 | _Text | None, Says(f"must be a 64-bit integer, a string of at most {MAX_STRING} characters or null")
]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Behaviour(_Strict):
    """One past behaviour with its time."""

    item_id: _AnyId = Field(description="the item, of the model's item id type")
    timestamp: _Int64 = Field(description="when, in the unit of the log that the cache was built from")


def _let_others_run(value: T) -> T:
    """Nothing; but where Python code runs, the interpreter may give its lock to the event loop.

    100,000 rows hold it for 230 ms without this, for 40 ms with it.
    """
    return value


_Row = Annotated[
    _AnyId | Annotated[Behaviour, AfterValidator(_let_others_run)],
    Says("must be an item id, or an object with item_id and timestamp"),
]


class ScoreRequest(_Strict):
    """Candidates to be scored for one user."""

    user_id: _AnyId = Field(description="the user, of the model's user id type")
    candidates: list[_AnyId] = Field(min_length=1, fail_fast=True, description="item ids to score")
    top_k: int | None = Field(None, ge=1, description="return only the best k, best first")
    recent_items: list[_Row] = Field(
        [], fail_fast=True, description="behaviours since the cache was built, oldest first"
    )
    history: Annotated[list[_Row], Field(fail_fast=True)] | None = Field(
        None, description="whole history, oldest first; replaces the cached record"
    )
    context: dict[_Text, _Category] | None = Field(
        None, max_length=MAX_COLUMNS, description="values of the model's context columns"
    )
    candidate_features: dict[_Text, Annotated[list[_Category], Field(fail_fast=True)]] | None = Field(
        None,
        max_length=MAX_COLUMNS,
        description="per item feature one value per candidate, in place of the catalogue's",
    )
    timeout_ms: int | None = Field(None, ge=1, description="how long the caller waits, at most LREA_TIMEOUT_MS")


class BatchRequest(_Strict):
    """Several score requests, answered together."""

    requests: list[ScoreRequest] = Field(
        min_length=1, fail_fast=True, description="the requests, at most LREA_MAX_BATCH_REQUESTS"
    )


class TopScores(_Strict):
    """The best candidates."""

    items: list[Id] = Field(description="item ids, best first, ties in the order of the request")
    scores: list[float] = Field(description="their probabilities")


class ScoreResponse(_Strict):
    """Scores of one user's candidates, and what they rest on."""

    user_id: Id = Field(description="the user, as sent")
    model_id: str = Field(description="the model that scored")
    generation: str | None = Field(description="the generation of the cache; null where none is published")
    user_state: Literal["cached", "recomputed", "empty"] = Field(description="where the user's history came from")
    degraded: list[str] = Field(description="why the answer is worse than it could be; empty when all is well")
    scores: list[float] | TopScores = Field(description="probabilities in candidate order; with top_k the best")
    gap_rows: int = Field(description="behaviours that are neither in the short window nor in the cached long part")
    dropped_rows: int = Field(
        description="recent_items that are not after the record's watermark, which has them already"
    )
    unknown_candidates: int = Field(description="candidates that the model was not trained on")


class BatchResponse(_Strict):
    """One answer per request, in order."""

    results: list[ScoreResponse] = Field(description="the answers")


class UserResponse(_Strict):
    """What the cache holds of one user."""

    user_id: Id = Field(description="the user")
    model_id: str = Field(description="the model that is served")
    generation: str = Field(description="the generation that is served")
    record_bytes: int = Field(description="size of the record")
    record_error: str | None = Field(description="why the record cannot be scored; null for a good one")
    watermark: int | None = Field(None, description="timestamp of the newest behaviour in the record")
    built_at_ms: int | None = Field(None, description="when the record was built, Unix milliseconds")
    long_rows: int | None = Field(None, description="behaviours in the compressed long history")
    short_rows: int | None = Field(None, description="behaviours in the stored short window")


class ModelResponse(_Strict):
    """What is served."""

    model_id: str = Field(description="content hash of the model")
    generation: str | None = Field(description="generation of the cache")
    device: str = Field(description="where it computes")
    dtype: str = Field(description="number format of the MLP's products")
    user_id_type: Literal["int", "string"] = Field(description="JSON type of user_id")
    item_id_type: Literal["int", "string"] = Field(description="JSON type of item ids")
    long_length: int = Field(description="L: rows of the long history")
    short_length: int = Field(description="S: rows of the short window")
    width: int = Field(description="d: width of an item's embedding")
    rank: int = Field(description="r: slots per user; 0 where the model keeps none")
    item_features: list[str] = Field(description="columns that candidate_features may set")
    user_features: list[str] = Field(description="columns stored in a user's record")
    context_features: list[str] = Field(description="columns that context may set")
    metadata: dict[str, Any] = Field(description="training facts, metrics and the absorption gap, from the bundle")


class ReadyResponse(_Strict):
    """Whether to send requests here."""

    status: Literal["ready", "starting", "draining", "dead"] = Field(description="ready answers 200, the others 503")
    degraded: list[str] = Field(description="what is wrong while the service goes on answering")


class LiveResponse(_Strict):
    """Whether to let the process live."""

    status: Literal["alive", "dead"] = Field(description="alive answers 200; dead 503: restart the process")


class Problem(_Strict):
    """RFC 9457 problem details: every answer that is not a success."""

    type: str = Field(description="urn:lrea:problem:… , one per kind of problem")
    title: str = Field(description="the kind, in words")
    status: int = Field(description="the HTTP status")
    detail: str = Field(description="what was found, what was wanted, what to do")
    request_id: str = Field(description="the x-request-id, as in the log")
    errors: list[dict[str, str]] | None = Field(None, description="pointer (RFC 6901) and detail per wrong field")
