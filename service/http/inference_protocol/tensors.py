"""Which tensors a request and an answer have: from tensors to what is asked, from a score to tensors.

Limits, the kind of the ids and the columns are checked where those of /v1/score are, in service/batching/prepare.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model.identifiers import Id
from model.vocabulary import Int64s
from service.errors import InvalidRequest
from service.http.inference_protocol.schemas import InferParameters, InferRequest
from service.http.inference_protocol.wire import Output, Values
from service.http.scoring import Scored, best
from service.schemas import Behaviour
from service.users.state import Row

IDS = ("user_id", "candidates", "recent_items", "history")
TIMES = {"recent_items": "recent_timestamps", "history": "history_timestamps"}
CONTEXT, FEATURES = "context.", "candidate_features."
ALWAYS = ("scores", "user_state", "degraded")
WITH_TOP_K = ("items", *ALWAYS)


@dataclass(frozen=True, eq=False)
class TensorRequest:
    """What one request asks; the fields mean what ScoreRequest says."""

    user_id: Id
    candidates: Sequence[Id] | Int64s
    top_k: int | None
    recent_items: Sequence[Row]
    history: Sequence[Row] | None
    context: Mapping[str, Id]
    candidate_features: Mapping[str, Sequence[Id]]
    timeout_ms: int | None


def read_tensors(tensors: Mapping[str, Values], parameters: InferParameters) -> TensorRequest:
    """What the tensors of a request ask. Raises InvalidRequest for an unknown, missing, or empty one."""
    for name, values in tensors.items():
        _check(name, values)
    for name in ("user_id", "candidates"):
        if name not in tensors:
            raise InvalidRequest.at("/inputs", f"there is no input {name!r}: send it")
        if not len(tensors[name]):
            raise InvalidRequest.at(f"/{name}", "has no elements: send at least one")
    return TensorRequest(
        user_id=_one("user_id", tensors["user_id"]),
        candidates=tensors["candidates"],
        top_k=parameters.top_k,
        recent_items=_rows("recent_items", tensors) or [],
        history=_rows("history", tensors),
        context={column: _one(CONTEXT + column, values) for column, values in _columns(CONTEXT, tensors)},
        candidate_features={column: _listed(values) for column, values in _columns(FEATURES, tensors)},
        timeout_ms=_timeout_ms(parameters),
    )


def _check(name: str, values: Values) -> None:
    if name in IDS:
        if isinstance(values, list) and "" in values:
            raise InvalidRequest.at(f"/{name}", "has an empty string, which is no id: send ids")
    elif name in TIMES.values():
        if isinstance(values, list):
            raise InvalidRequest.at(f"/{name}", "is of BYTES, and timestamps are of INT64: send it as that")
    elif not name.startswith((CONTEXT, FEATURES)):
        known = ", ".join((*IDS, *TIMES.values(), CONTEXT + "<column>", FEATURES + "<column>"))
        raise InvalidRequest.at("/inputs", f"no input is called {name!r}: there are {known}")


def _one(name: str, values: Values) -> Id:
    if len(values) != 1:
        raise InvalidRequest.at(f"/{name}", f"has {len(values)} elements, wanted 1: send one user's request")
    return _listed(values)[0]


def _listed(values: Values) -> Sequence[Id]:
    return values if isinstance(values, list) else list(values.tolist())


def _rows(name: str, tensors: Mapping[str, Values]) -> Sequence[Row] | None:
    ids, times = tensors.get(name), tensors.get(TIMES[name])
    if times is None:
        return None if ids is None else _listed(ids)
    assert isinstance(times, np.ndarray), "only INT64 was let through"
    if ids is None or len(ids) != len(times):
        found = "no" if ids is None else len(ids)
        raise InvalidRequest.at(f"/{TIMES[name]}", f"has {len(times)} for {found} {name}: send one for each")
    pairs = zip(_listed(ids), times.tolist(), strict=True)
    return [Behaviour.model_construct(item_id=item, timestamp=time) for item, time in pairs]


def _columns(prefix: str, tensors: Mapping[str, Values]) -> list[tuple[str, Values]]:
    return [(name.removeprefix(prefix), values) for name, values in tensors.items() if name.startswith(prefix)]


def _timeout_ms(parameters: InferParameters) -> int | None:
    if parameters.timeout_ms is not None or parameters.timeout is None:
        return parameters.timeout_ms
    return -(-parameters.timeout // 1000)  # rounded up: 1 µs is no wait of 0 ms


def check_outputs(request: InferRequest) -> None:
    """Raises InvalidRequest for an output that the answer will not have, or that is wanted twice."""
    names = ALWAYS if request.parameters.top_k is None else WITH_TOP_K
    for index, output in enumerate(request.outputs):
        at = f"/outputs/{index}"
        if output.name not in names:
            hint = " (items only with the parameter top_k)" if output.name == "items" else ""
            raise InvalidRequest.at(at, f"no output is called {output.name!r}: there are {', '.join(names)}{hint}")
        if output.name in {other.name for other in request.outputs[:index]}:
            raise InvalidRequest.at(at, f"output {output.name!r} is wanted twice: ask once")


def outputs_of(request: InferRequest, scored: Scored) -> list[tuple[Output, bool]]:
    """The outputs that are wanted, and whether each is to be sent as bytes."""
    by_default = request.parameters.binary_data_output
    outputs = {output.name: output for output in _all_outputs(scored)}
    if not request.outputs:
        return [(output, by_default) for output in outputs.values()]
    wanted = ((outputs[output.name], output.parameters.binary_data) for output in request.outputs)
    return [(output, by_default if binary is None else binary) for output, binary in wanted]


def _all_outputs(scored: Scored) -> list[Output]:
    asked, _, score = scored
    about = [Output("user_state", "BYTES", [score.origin]), Output("degraded", "BYTES", score.degraded)]
    if asked.top_k is None:
        return [Output("scores", "FP32", score.probabilities_B), *about]
    places = best(score.logits_B, asked.top_k)
    return [_items(asked.candidates, places), Output("scores", "FP32", score.probabilities_B[places]), *about]


def _items(candidates: Sequence[Id] | Int64s, places: npt.NDArray[np.intp]) -> Output:
    if isinstance(candidates, np.ndarray):
        return Output("items", "INT64", candidates[places])
    return Output("items", "BYTES", [str(candidates[place]) for place in places])
