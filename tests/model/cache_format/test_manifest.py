"""Manifest and active pointer: exact JSON, round trips, and refusals that name the field."""

from dataclasses import replace
from typing import Any

import orjson
import pytest

from model.cache_format import ActivePointer, Manifest, ManifestError, Published, RecordShape

MANIFEST = Manifest(
    format_version=1,
    model_id="3f2a00c0ffee",
    generation="20261123T165357-3fa29c",
    users=2469,
    record_bytes=40_000_000,
    precision="float16",
    as_of=1_700_000_000,
    built_at_ms=1_795_000_000_000,
    user_kind="int",
    shape=RecordShape(
        long_length=512,
        short_length=32,
        width=32,
        rank=32,
        sketch_cells=(2048, 512),
        item_kind="string",
        user_features=1,
    ),
    source={"interactions.parquet": "1470000 rows"},
    versions={"lrea": "0.1.0"},
)
POINTER = ActivePointer(Published("3f2a00c0ffee", "b"), Published("91bc00c0ffee", "a"), epoch=7)


def test_the_manifest_as_json() -> None:
    assert MANIFEST.to_json() == (
        b'{"as_of":1700000000,"built_at_ms":1795000000000,"format_version":1,"generation":"20261123T165357-3fa29c",'
        b'"model_id":"3f2a00c0ffee","precision":"float16","record_bytes":40000000,'
        b'"shape":{"item_kind":"string","long_length":512,"rank":32,"short_length":32,"sketch_cells":[2048,512],'
        b'"user_features":1,"width":32},"source":{"interactions.parquet":"1470000 rows"},"user_kind":"int",'
        b'"users":2469,"versions":{"lrea":"0.1.0"}}'
    )
    assert Manifest.from_json(MANIFEST.to_json()) == MANIFEST
    assert Manifest.from_json(replace(MANIFEST, as_of=None).to_json()).as_of is None


def test_the_pointer_as_json() -> None:
    assert POINTER.to_json() == (
        b'{"current":{"generation":"b","model_id":"3f2a00c0ffee"},"epoch":7,'
        b'"previous":{"generation":"a","model_id":"91bc00c0ffee"}}'
    )
    assert ActivePointer.from_json(POINTER.to_json()) == POINTER
    first = replace(POINTER, previous=None)
    assert ActivePointer.from_json(first.to_json()) == first


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("users", -1),
        ("users", True),
        ("users", 2.0),
        ("users", "2469"),
        ("record_bytes", None),
        ("precision", "float8"),
        ("as_of", "yesterday"),
        ("user_kind", "uuid"),
        ("shape", []),
        ("source", {"interactions.parquet": 3}),
        ("versions", None),
        ("generation", 5),
    ],
)
def test_a_wrong_value_is_refused_by_name(field: str, value: Any) -> None:
    fields = orjson.loads(MANIFEST.to_json()) | {field: value}
    with pytest.raises(ManifestError, match=rf"manifest\.{field} is "):
        Manifest.from_json(orjson.dumps(fields))


@pytest.mark.parametrize(
    ("field", "value"), [("rank", -1), ("sketch_cells", [512, "x"]), ("item_kind", None), ("width", 1.5)]
)
def test_a_wrong_shape_is_refused_by_name(field: str, value: Any) -> None:
    fields = orjson.loads(MANIFEST.to_json())
    fields["shape"][field] = value
    with pytest.raises(ManifestError, match=rf"manifest\.shape\.{field} is "):
        Manifest.from_json(orjson.dumps(fields))


def test_a_shape_that_no_record_can_have_is_refused() -> None:
    fields = orjson.loads(MANIFEST.to_json())
    fields["shape"]["width"] = 2**16
    with pytest.raises(ManifestError, match="width is 65536"):
        Manifest.from_json(orjson.dumps(fields))


@pytest.mark.parametrize("field", list(orjson.loads(MANIFEST.to_json())))
def test_a_missing_field_is_refused_by_name(field: str) -> None:
    fields = orjson.loads(MANIFEST.to_json())
    del fields[field]
    with pytest.raises(ManifestError, match=rf"manifest\.{field} is missing"):
        Manifest.from_json(orjson.dumps(fields))


def test_an_unknown_field_is_refused_by_name() -> None:
    fields = orjson.loads(MANIFEST.to_json()) | {"colour": "red"}
    with pytest.raises(ManifestError, match=r"manifest\.colour is unknown"):
        Manifest.from_json(orjson.dumps(fields))


def test_another_format_version_is_refused() -> None:
    with pytest.raises(ManifestError, match="format version 2, this program reads 1"):
        Manifest.from_json(replace(MANIFEST, format_version=2).to_json())


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[]", b"null"])
def test_what_is_not_an_object_is_refused(data: bytes) -> None:
    with pytest.raises(ManifestError, match=r"is not JSON|wanted an object"):
        Manifest.from_json(data)
    with pytest.raises(ManifestError, match=r"is not JSON|wanted an object"):
        ActivePointer.from_json(data)


@pytest.mark.parametrize(
    ("patch", "named"),
    [
        ({"epoch": -1}, r"active pointer\.epoch is -1"),
        ({"current": None}, r"active pointer\.current is None"),
        ({"current": {"model_id": "3f2a00c0ffee"}}, r"active pointer\.current\.generation is missing"),
        ({"current": {"model_id": "../..", "generation": "a"}}, r"active pointer\.current: model id '\.\./\.\.'"),
        ({"previous": {"model_id": 1, "generation": "a"}}, r"active pointer\.previous\.model_id is 1"),
    ],
)
def test_a_wrong_pointer_is_refused_by_name(patch: dict[str, Any], named: str) -> None:
    fields = orjson.loads(POINTER.to_json()) | patch
    with pytest.raises(ManifestError, match=named):
        ActivePointer.from_json(orjson.dumps(fields))
