"""The JSON objects of the protocol, as far as this service takes and gives them. Strict, as in service/schemas.py."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.schemas import MAX_COLUMNS, MAX_STRING, Says

Datatype = Literal["INT64", "BYTES", "FP32"]
MAX_INPUTS = 6 + 2 * MAX_COLUMNS
_Dimension = Annotated[int, Field(ge=0)]
# Typed, so that a list ends at its first wrong element: 600,000 objects are not built to be refused.
_Element = int | Annotated[str, Field(max_length=MAX_STRING)]
_Elements = Annotated[list[_Element], Field(fail_fast=True)]
_Data = Annotated[
    _Element | _Elements,
    Says(f"must be an integer or a string of at most {MAX_STRING} characters, or in data of two axes a list of those"),
]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class InputParameters(_Strict):
    """Where the elements of an input are."""

    binary_data_size: int | None = Field(None, ge=0, description="bytes that the input has behind the JSON")


class InferInput(_Strict):
    """One input tensor."""

    name: str = Field(max_length=MAX_STRING, description="which input")
    shape: list[_Dimension] = Field(min_length=1, max_length=2, fail_fast=True, description="[n] or [1, n]")
    datatype: Literal["INT64", "BYTES"] = Field(description="INT64 for integers, BYTES for UTF-8 text")
    parameters: InputParameters = Field(InputParameters(), description="of an input that is sent as bytes")
    data: Annotated[list[_Data], Field(fail_fast=True)] | None = Field(
        None, description="elements of an input that is sent as JSON"
    )


class OutputParameters(_Strict):
    """How an output is to be sent."""

    binary_data: bool | None = Field(None, description="send this output as bytes, or not")


class RequestedOutput(_Strict):
    """One output that the caller wants."""

    name: str = Field(max_length=MAX_STRING, description="which output")
    parameters: OutputParameters = Field(OutputParameters(), description="how to send it")


class InferParameters(_Strict):
    """What holds for the whole request."""

    top_k: int | None = Field(None, ge=1, description="return only the best k, best first")
    timeout_ms: int | None = Field(None, ge=1, description="how long the caller waits, at most LREA_TIMEOUT_MS")
    timeout: int | None = Field(None, ge=1, description="the same in microseconds; timeout_ms goes first")
    binary_data_output: bool = Field(False, description="send every output as bytes that does not say otherwise")


class InferRequest(_Strict):
    """One user's candidates as tensors: the JSON in front of the bytes, or all there is."""

    id: str | None = Field(None, max_length=MAX_STRING, description="comes back in the answer")
    parameters: InferParameters = Field(InferParameters(), description="what holds for the whole request")
    inputs: list[InferInput] = Field(
        min_length=1, max_length=MAX_INPUTS, fail_fast=True, description="the input tensors; their bytes in this order"
    )
    outputs: list[RequestedOutput] = Field(
        [], max_length=MAX_INPUTS, fail_fast=True, description="the outputs that are wanted; none means all"
    )


class InferOutput(_Strict):
    """One output tensor."""

    name: str = Field(description="which output")
    datatype: Datatype = Field(description="type of its elements")
    shape: list[int] = Field(description="always [n]")
    parameters: dict[str, int] | None = Field(None, description="binary_data_size, of an output that is sent as bytes")
    data: list[Any] | None = Field(None, description="elements of an output that is sent as JSON")


class InferResponse(_Strict):
    """The scores, and what they rest on."""

    model_name: str = Field(description="always lrea")
    model_version: str = Field(description="model_id of the model that scored")
    id: str | None = Field(None, description="the request's")
    parameters: dict[str, int | str] = Field(description="the other facts of the answer, as from /v1/score")
    outputs: list[InferOutput] = Field(description="the output tensors; their bytes in this order")


class ServerMetadata(_Strict):
    """Who answers."""

    name: str = Field(description="always lrea")
    version: str = Field(description="version of this interface")
    extensions: list[str] = Field(description="extensions of the protocol that are spoken")


class TensorMetadata(_Strict):
    """A tensor that the model takes or gives."""

    name: str = Field(description="name of the tensor")
    datatype: Datatype = Field(description="type of its elements")
    shape: list[int] = Field(description="-1 for any length")


class ModelMetadata(_Strict):
    """What the model takes and gives."""

    name: str = Field(description="always lrea")
    versions: list[str] = Field(description="model_id of the one model that is served")
    platform: str = Field(description="always lrea_torch")
    inputs: list[TensorMetadata] = Field(description="inputs that a request may have")
    outputs: list[TensorMetadata] = Field(description="outputs that an answer may have")


class IndexEntry(_Strict):
    """One model that can be asked."""

    name: str = Field(description="always lrea")
    version: str = Field(description="model_id of the model that is served")
    state: Literal["READY", "UNAVAILABLE"] = Field(description="READY as /readyz has it")
    reason: str = Field(description="why it is not ready")


class LiveState(_Strict):
    """Whether to let the process live, as /livez has it."""

    live: bool = Field(description="true answers 200, false 503")


class ReadyState(_Strict):
    """Whether to send requests here, as /readyz has it."""

    ready: bool = Field(description="true answers 200, false 503")


class ModelReadyState(_Strict):
    """Whether the model can be asked: it can whenever the service can."""

    name: str = Field(description="always lrea")
    ready: bool = Field(description="true answers 200, false 503")


class ProtocolError(_Strict):
    """Every answer of the protocol that is not a success."""

    error: str = Field(description="what was found, what was wanted, what to do")
