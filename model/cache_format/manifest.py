"""What is published: the manifest of a generation and the active pointer, as JSON.

Both are read strictly: a field that is missing, unknown or of another type is refused by its name.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

import orjson

from model.cache_format.errors import ManifestError
from model.cache_format.keys import generation_prefix
from model.cache_format.pair import PRECISIONS, Precision
from model.cache_format.record import FORMAT_VERSION
from model.cache_format.shape import RecordShape
from model.identifiers import IdKind


@dataclass(frozen=True)
class Manifest:
    """What one generation holds, written after its last record."""

    format_version: int
    model_id: str
    generation: str
    users: int
    record_bytes: int  # sum over the records, keys not counted
    precision: Precision
    as_of: int | None  # only behaviours before this timestamp were read; None: all of them
    built_at_ms: int  # Unix time
    user_kind: IdKind
    shape: RecordShape
    source: Mapping[str, str]  # file -> fingerprint
    versions: Mapping[str, str]  # program -> version

    def to_json(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces."""
        return _dump(asdict(self) | {"source": dict(self.source), "versions": dict(self.versions)})

    @classmethod
    def from_json(cls, data: bytes) -> "Manifest":
        """Raises ManifestError that names the field."""
        fields = _fields(_load("manifest", data), "manifest", _MANIFEST_FIELDS)
        if fields["format_version"] != FORMAT_VERSION:
            found = f"manifest has format version {fields['format_version']}, this program reads {FORMAT_VERSION}"
            raise ManifestError(f"{found}: build the cache with this version")
        shape = _fields(fields["shape"], "manifest.shape", _SHAPE_FIELDS)
        try:
            generation_prefix("any", fields["model_id"], fields["generation"])
            fields["shape"] = RecordShape(**shape | {"sketch_cells": tuple(shape["sketch_cells"])})
        except ValueError as error:
            raise ManifestError(f"manifest: {error}") from error
        return cls(**fields)


@dataclass(frozen=True)
class Published:
    """One generation of one model."""

    model_id: str
    generation: str


@dataclass(frozen=True)
class ActivePointer:
    """What readers follow. `epoch` grows by one with every flip, so that a flip can say what it replaces."""

    current: Published
    previous: Published | None
    epoch: int

    def to_json(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces."""
        return _dump(asdict(self))

    @classmethod
    def from_json(cls, data: bytes) -> "ActivePointer":
        """Raises ManifestError that names the field."""
        fields = _fields(_load("active pointer", data), "active pointer", _POINTER_FIELDS)
        previous = fields["previous"]
        return cls(
            current=_published(fields["current"], "active pointer.current"),
            previous=None if previous is None else _published(previous, "active pointer.previous"),
            epoch=fields["epoch"],
        )


# A check per field, and what it wants, in words.
_Check = tuple[Callable[[Any], bool], str]


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


_COUNT: _Check = (_is_count, "an integer, 0 or more")
_INTEGER_OR_NULL: _Check = (lambda value: value is None or type(value) is int, "an integer or null")
_TEXT: _Check = (lambda value: isinstance(value, str), "a string")
_OBJECT: _Check = (lambda value: isinstance(value, dict), "an object")
_OBJECT_OR_NULL: _Check = (lambda value: value is None or isinstance(value, dict), "an object or null")
_COUNTS: _Check = (lambda value: isinstance(value, list) and all(map(_is_count, value)), "a list of integers")
_TEXTS: _Check = (
    lambda value: isinstance(value, dict) and all(isinstance(text, str) for text in value.values()),
    "an object of strings",
)


def _one_of(allowed: tuple[str, ...]) -> _Check:
    return (lambda value: value in allowed, f"one of {', '.join(allowed)}")


_ID_KIND = _one_of(get_args(IdKind))
_SHAPE_FIELDS: dict[str, _Check] = {
    "long_length": _COUNT,
    "short_length": _COUNT,
    "width": _COUNT,
    "rank": _COUNT,
    "sketch_cells": _COUNTS,
    "item_kind": _ID_KIND,
    "user_features": _COUNT,
}
_MANIFEST_FIELDS: dict[str, _Check] = {
    "format_version": _COUNT,
    "model_id": _TEXT,
    "generation": _TEXT,
    "users": _COUNT,
    "record_bytes": _COUNT,
    "precision": _one_of(PRECISIONS),
    "as_of": _INTEGER_OR_NULL,
    "built_at_ms": _COUNT,
    "user_kind": _ID_KIND,
    "shape": _OBJECT,
    "source": _TEXTS,
    "versions": _TEXTS,
}
_PUBLISHED_FIELDS: dict[str, _Check] = {"model_id": _TEXT, "generation": _TEXT}
_POINTER_FIELDS: dict[str, _Check] = {"current": _OBJECT, "previous": _OBJECT_OR_NULL, "epoch": _COUNT}


def _published(value: Any, where: str) -> Published:
    fields = _fields(value, where, _PUBLISHED_FIELDS)
    try:
        generation_prefix("any", fields["model_id"], fields["generation"])
    except ValueError as error:
        raise ManifestError(f"{where}: {error}") from error
    return Published(**fields)


def _dump(value: dict[str, Any]) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def _load(what: str, data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise ManifestError(f"{what} is not JSON ({error}): publish a generation again") from error


def _fields(value: Any, where: str, checks: Mapping[str, _Check]) -> dict[str, Any]:
    """The fields of a JSON object, all of them present and none besides."""
    if not isinstance(value, dict):
        raise ManifestError(f"{where} is {type(value).__name__}, wanted an object")
    if odd := sorted(value.keys() ^ checks.keys()):
        problem = "is unknown" if odd[0] in value else "is missing"
        raise ManifestError(f"{where}.{odd[0]} {problem}: publish a generation with this version of the builder")
    for name, (holds, wanted) in checks.items():
        if not holds(value[name]):
            raise ManifestError(f"{where}.{name} is {value[name]!r}, wanted {wanted}")
    return value
