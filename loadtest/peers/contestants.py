"""Who is measured: how each server is started, what its requests look like, and where its answers keep the scores."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from loadtest.peers.work import Place
from loadtest.processes import free_port

SERVICE, SERVICE_CACHED = "service", "service, resident users"
FRAMEWORKS = ("litserve", "bentoml", "mlserver")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "LREA_TORCH_THREADS": "1"}

ONE_BY_ONE = ", one by one"  # behind the name of a framework whose batching is off
MLSERVER_BATCHING = {"max_batch_size": 16, "max_batch_time": 0.002}

Command = Callable[[Place, int, Path], list[str]]


@dataclass(frozen=True)
class Contestant:
    """One server. command: from the place, a port and a folder of its own to a command line."""

    name: str
    command: Command
    environment: Callable[[Place, int], Mapping[str, str]]
    path: str
    body: Callable[[int, Sequence[int]], Any]
    scores: Callable[[Any], Any]
    marker: bytes  # the name in front of the list of scores in an answer; empty: the answer begins with it

    def scores_of(self, body: bytes) -> list[float]:
        """The scores of an answer, read in full."""
        return list(self.scores(orjson.loads(body)))

    def count_scores(self, body: bytes) -> int:
        """How many scores an answer has, without reading them: commas in the list behind the marker."""
        start = body.index(b"[", body.index(self.marker))
        return body.count(b",", start, body.index(b"]", start)) + 1


def contestants(pythons: Mapping[str, Path]) -> list[Contestant]:
    """The service, plain FastAPI, and each framework of which `pythons` has an environment, in batches and without."""
    makers = {"litserve": _litserve, "bentoml": _bentoml, "mlserver": _mlserver}
    frameworks = [
        makers[name](name + how, str(python), how != "") for name, python in pythons.items() for how in ("", ONE_BY_ONE)
    ]
    return [
        _service(SERVICE, {"LREA_USER_CACHE_MB": "0"}),
        _service(SERVICE_CACHED, {}),
        _fastapi(),
        *frameworks,
    ]


def framework_of(name: str) -> str | None:
    """The framework that a contestant's name begins with; None for the service and for FastAPI."""
    return next((framework for framework in FRAMEWORKS if name.startswith(framework)), None)


def _service(name: str, settings: Mapping[str, str]) -> Contestant:
    def environment(place: Place, port: int) -> dict[str, str]:
        where = {"STORE_URL": place.store, "KEY_PREFIX": place.prefix, "BUNDLES_DIR": place.bundles, "PORT": str(port)}
        patient = {"STORE_TIMEOUT_MS": "2000", "TIMEOUT_MS": "20000", "DEVICE": "cpu"}  # as patient as the peers
        return {f"LREA_{setting}": value for setting, value in {**where, **patient}.items()} | dict(settings)

    def command(place: Place, _port: int, _folder: Path) -> list[str]:
        return [sys.executable, "-m", "scripts.serve_null" if place.null else "service"]

    return Contestant(name, command, environment, "/v1/score", _question, _named, b'"scores"')


def _fastapi() -> Contestant:
    return _peer("fastapi", _module("plain_fastapi", sys.executable))


def _litserve(name: str, python: str, one_by_one: bool) -> Contestant:
    return _peer(name, _module("with_litserve", python, *(["--one-by-one"] if one_by_one else [])))


def _bentoml(name: str, python: str, one_by_one: bool) -> Contestant:
    service = "OneByOne" if one_by_one else "InBatches"

    def command(place: Place, port: int, _folder: Path) -> list[str]:
        given = [option for name, value in asdict(place).items() for option in ("--arg", f"{name}={value}")]
        serve = [python, "-m", "bentoml", "serve", f"loadtest.peers.with_bentoml:{service}", *given]
        return [*serve, "--host", "127.0.0.1", "--port", str(port)]

    def in_a_list(user_id: int, candidates: Sequence[int]) -> dict[str, Any]:
        return {"questions": [_question(user_id, candidates)]}

    found = _peer(name, command, {"BENTOML_DO_NOT_TRACK": "True"})
    if one_by_one:
        return replace(found, scores=lambda answer: answer, marker=b"")
    return replace(found, body=in_a_list, scores=lambda answer: answer[0], marker=b"")


def _mlserver(name: str, python: str, one_by_one: bool) -> Contestant:
    def command(place: Place, port: int, folder: Path) -> list[str]:
        _write_mlserver(folder, place, port, {} if one_by_one else MLSERVER_BATCHING)
        return [python, "-m", "mlserver.cli.main", "start", str(folder)]

    def body(user_id: int, candidates: Sequence[int]) -> dict[str, Any]:
        return {"inputs": [_tensor("user_id", [user_id]), _tensor("candidates", candidates)]}

    def scores(answer: Any) -> Any:
        return answer["outputs"][0]["data"]

    found = _peer(name, command)
    return replace(found, path="/v2/models/scoring/infer", body=body, scores=scores, marker=b'"data"')


def _peer(name: str, command: Command, environment: Mapping[str, str] | None = None) -> Contestant:
    added = environment or {}
    return Contestant(name, command, lambda *_: added, "/score", _question, _named, b'"scores"')


def _tensor(name: str, values: Sequence[int]) -> dict[str, Any]:
    return {"name": name, "shape": [1, len(values)], "datatype": "INT64", "data": list(values)}


def _write_mlserver(folder: Path, place: Place, port: int, batching: Mapping[str, float]) -> None:
    """Its two files of settings: no pool of workers, for there is one core; no metrics that nobody asks for."""
    folder.mkdir(parents=True, exist_ok=True)
    server = {"parallel_workers": 0, "host": "127.0.0.1", "http_port": port, "debug": False}
    server |= {"grpc_port": free_port(), "metrics_endpoint": None, "gzip_enabled": False}
    model = {"name": "scoring", "implementation": "loadtest.peers.with_mlserver.ScoringRuntime", **batching}
    model["parameters"] = {"extra": asdict(place)}
    (folder / "settings.json").write_text(json.dumps(server))
    (folder / "model-settings.json").write_text(json.dumps(model))


def _module(name: str, python: str, *options: str) -> Command:
    def command(place: Place, port: int, _folder: Path) -> list[str]:
        return [python, "-m", f"loadtest.peers.{name}", place.to_json(), str(port), *options]

    return command


def _question(user_id: int, candidates: Sequence[int]) -> dict[str, Any]:
    return {"user_id": user_id, "candidates": list(candidates)}


def _named(answer: Any) -> Any:
    return answer["scores"]
