"""Vocabularies and the catalogue: exact lookup, missing and unknown values, one hash per id whoever computes it."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.catalogue import Catalogue, FeatureSpec
from model.identifiers import INT64_MAX, INT64_MIN, Id, IdKind, canonical_bytes, match_hash
from model.log.column_hashes import hash_integers
from model.log.column_vocabulary import encode_column, vocabulary_of
from model.vocabulary import FIRST_KNOWN, MISSING, UNKNOWN, Vocabulary

ints = st.integers(INT64_MIN, INT64_MAX)
texts = st.text(max_size=12)


@given(known=st.lists(ints, max_size=30), asked=st.lists(st.one_of(st.none(), ints), max_size=30))
def test_integers_are_looked_up_exactly(known: list[int], asked: list[int | None]) -> None:
    check_lookup(of("int", known, seed=3), sorted(set(known)), [*asked, *known])


@given(known=st.lists(texts, max_size=30), asked=st.lists(st.one_of(st.none(), texts), max_size=30))
def test_strings_are_looked_up_exactly(known: list[str], asked: list[str | None]) -> None:
    by_bytes = sorted(set(known), key=lambda text: text.encode())
    check_lookup(of("string", known, seed=3), by_bytes, [*asked, *known])


def of(kind: IdKind, values: list[Any], seed: int) -> Vocabulary:
    return vocabulary_of(kind, pa.array(values, pa.int64() if kind == "int" else pa.string()), seed)


def check_lookup(vocabulary: Vocabulary, in_order: list[Any], asked: list[Any]) -> None:
    assert vocabulary.values() == in_order
    codes, hashes = vocabulary.encode(asked)
    column = encode_column(vocabulary, pa.array(asked, pa.int64() if vocabulary.kind == "int" else pa.string()))
    assert [of_column.tolist() for of_column in column] == [codes.tolist(), hashes.tolist()]
    for value, code, value_hash in zip(asked, codes.tolist(), hashes.tolist(), strict=True):
        expected = MISSING if value is None else UNKNOWN
        assert code == (in_order.index(value) + FIRST_KNOWN if value in in_order else expected)
        assert value_hash == match_hash(value, 3)


@pytest.mark.parametrize("kind", ["int", "string"])
def test_two_hundred_thousand_ids_are_told_apart(kind: IdKind) -> None:
    """More than are hashed at a time, in no order, and as many that are not known."""
    numbers = np.random.default_rng(0).permutation(400_000) * 7_919
    ids = pa.array(numbers) if kind == "int" else pa.array([f"id-{number:010d}é" for number in numbers])
    vocabulary = vocabulary_of(kind, ids[:200_000], seed=5)
    codes, hashes = encode_column(vocabulary, ids)
    rank = np.argsort(np.argsort(numbers[:200_000]))  # zero-padded, so strings have the order of their numbers
    assert np.array_equal(codes[:200_000], rank + FIRST_KNOWN)
    assert np.all(codes[200_000:] == UNKNOWN)
    assert np.array_equal(hashes[:200_000], vocabulary.hash_of_code[codes[:200_000]])
    for index in (0, 65_535, 65_536, 199_999, 200_000, 399_999):
        assert hashes[index] == match_hash(ids[index].as_py(), 5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pa.array([1.5]), "found double, wanted ints"),
        (pa.array([True]), "found bool, wanted ints"),
        (pa.array(["1"]), "found string, wanted ints"),
    ],
)
def test_a_column_of_another_type_is_refused(values: pa.Array, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_column(of("int", [1], seed=0), values)


def test_a_column_of_nulls_is_missing_whatever_its_type() -> None:
    codes, hashes = encode_column(of("int", [1], seed=0), pa.nulls(2))
    assert (codes.tolist(), hashes.tolist()) == ([MISSING, MISSING], [0, 0])


@given(value=ints, seed=st.integers(0, 2**64 - 1))
def test_integers_hash_alike_alone_and_in_a_column(value: int, seed: int) -> None:
    assert hash_integers(np.array([value, value]), seed).tolist() == [match_hash(value, seed)] * 2


def test_two_strings_of_one_hash_stay_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.vocabulary.match_hashes", lambda values, seed: np.array([77 for _ in values]))
    monkeypatch.setattr("model.vocabulary.hash_texts", lambda blob, offsets, seed: np.full(len(offsets) - 1, 77))
    vocabulary = of("string", ["a", "b", "c"], seed=0)
    assert vocabulary.encode(["c", "a", "z", None, "b"])[0].tolist() == [4, 2, UNKNOWN, MISSING, 3]


@pytest.mark.parametrize(("kind", "value"), [("int", "5"), ("int", True), ("int", 5.0), ("string", 5)])
def test_a_value_of_another_type_is_refused(kind: IdKind, value: Id) -> None:
    vocabulary = of(kind, [1] if kind == "int" else ["1"], seed=0)
    with pytest.raises(ValueError, match=f"found a value of type {type(value).__name__}, wanted {kind}s"):
        vocabulary.encode([value])


def test_an_integer_beyond_64_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="signed 64-bit integer"):
        of("int", [1], seed=0).encode([2**63])


@pytest.mark.parametrize("tensors", [{"ids": np.array([2, 1])}, {"ids": np.array([1, 1])}])
def test_unsorted_integers_are_refused(tensors: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not in rising order"):
        Vocabulary("int", tensors, seed=0)


def test_offsets_that_do_not_span_the_text_are_refused() -> None:
    with pytest.raises(ValueError, match="do not span"):
        Vocabulary("string", {"blob": np.zeros(3, np.uint8), "offsets": np.array([0, 2])}, seed=0)


def test_canonical_bytes_are_pinned() -> None:
    assert canonical_bytes(-2) == b"\xfe\xff\xff\xff\xff\xff\xff\xff"
    assert canonical_bytes("é") == b"\xc3\xa9"
    with pytest.raises(ValueError, match="not valid Unicode"):
        canonical_bytes("\ud800")


def catalogue() -> Catalogue:
    items = of("int", [10, 20], seed=1)
    colours = of("string", ["red", "blue"], seed=2)
    return Catalogue(items, {"colour": colours}, np.array([[0], [0], [3], [0]]))  # item 10 is red, 20 has no colour


def test_items_carry_their_row_features_and_hashes() -> None:
    encoded = catalogue().encode([20, 99, 10])
    assert encoded.rows.tolist() == [3, UNKNOWN, 2]
    assert encoded.codes.tolist() == [[0], [0], [3]]
    expected = [[match_hash(20, 1), 0], [match_hash(99, 1), 0], [match_hash(10, 1), match_hash("red", 2)]]
    assert encoded.hashes.tolist() == expected


def test_ids_in_an_array_are_encoded_as_those_in_a_list() -> None:
    ids, features = [20, 99, INT64_MIN, 10], {"colour": ["blue", None, "green", "red"]}
    for given_features in (None, features):
        wanted, found = (catalogue().encode(form, given_features) for form in (ids, np.array(ids)))
        for wanted_tensor, found_tensor in zip(wanted, found, strict=True):
            assert found_tensor.tolist() == wanted_tensor.tolist()
    texts_only = Catalogue(of("string", ["a"], seed=1), {}, np.zeros((3, 0), np.int64))
    with pytest.raises(ValueError, match="found an array of integers, wanted strings"):
        texts_only.encode(np.array([1]))


def test_given_features_replace_the_catalogue_s() -> None:
    encoded = catalogue().encode([99, 10, 10], {"colour": ["blue", None, "green"]})
    assert encoded.codes.tolist() == [[2], [MISSING], [UNKNOWN]]
    assert encoded.hashes[:, 1].tolist() == [match_hash("blue", 2), 0, match_hash("green", 2)]


def test_encoding_leaves_the_catalogue_as_it_was() -> None:
    known = catalogue()
    known.encode([10], {"colour": ["blue"]})
    assert known.encode([10]).codes.tolist() == [[3]]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"size": [1]}, "no item feature is called 'size'"),
        ({"colour": ["red", "red"]}, "has 2 values for 1 items"),
        ({"colour": [1]}, "feature 'colour': found a value of type int"),
    ],
)
def test_features_that_do_not_fit_are_refused(features: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        catalogue().encode([10], features)


def test_side_features_are_encoded_in_the_order_of_the_columns() -> None:
    spec = FeatureSpec("user", {"age": of("int", [30], 0), "town": of("string", ["Ulm"], 0)})
    assert spec.encode({"town": "Ulm"}).tolist() == [MISSING, 2]
    assert spec.encode({"town": "Rom", "age": 30}).tolist() == [2, UNKNOWN]
    with pytest.raises(ValueError, match="no user feature is called 'name'"):
        spec.encode({"name": "x"})
