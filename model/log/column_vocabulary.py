"""Vocabularies of whole Arrow columns: made from one and looked up for one, without a Python object per value.

Requests come with a few thousand values and go through `Vocabulary.encode`; a log may have ten million. Apart from
that module so that the service, which reads no Parquet, needs no Arrow. Letters: n values of the column.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from model.identifiers import NULL_HASH, IdKind
from model.log.column_hashes import hash_texts
from model.log.parquet_columns import column_kind
from model.vocabulary import FIRST_KNOWN, MISSING, UNKNOWN, Bools, Int64s, UInt8s, Vocabulary


def vocabulary_of(kind: IdKind, values: pa.Array | pa.ChunkedArray, seed: int) -> Vocabulary:
    """The vocabulary of the distinct `values`, in any order; nulls are left out."""
    if kind == "int":
        ids = np.sort(values.drop_null().cast(pa.int64()).to_numpy())
        # np.unique hashes first, at random places in memory: of 10 M ids it took ten times as long.
        return Vocabulary(kind, {"ids": ids[np.append(True, ids[1:] != ids[:-1])[: len(ids)]]}, seed)
    distinct = pc.unique(values.cast(pa.large_string())).drop_null()
    blob, offsets = _texts(distinct.take(pc.sort_indices(distinct)))  # which sorts by bytes
    return Vocabulary(kind, {"blob": blob, "offsets": offsets}, seed)


def encode_column(vocabulary: Vocabulary, values: pa.Array) -> tuple[Int64s, Int64s]:
    """Codes and match hashes of `values`, each int64 [n], as `Vocabulary.encode` gives them.

    Raises ValueError for values of another type; a column of nulls alone may be of any.
    """
    missing = values.is_null().to_numpy(zero_copy_only=False)
    if missing.all():
        return np.full(len(values), MISSING, dtype=np.int64), np.full(len(values), NULL_HASH, dtype=np.int64)
    if column_kind(values.type) != vocabulary.kind:
        raise ValueError(f"found {values.type}, wanted {vocabulary.kind}s: cast or bucket it")
    if vocabulary.kind == "int":
        return _encode_integers(vocabulary, values.cast(pa.int64()).fill_null(0).to_numpy(), missing)
    return _encode_texts(vocabulary, values.cast(pa.large_string()), missing)


def _encode_integers(vocabulary: Vocabulary, values: Int64s, missing: Bools) -> tuple[Int64s, Int64s]:
    order = np.argsort(values)  # binary searches for rising values stay in cache
    codes, hashes = np.empty_like(values), np.empty_like(values)
    codes[order], hashes[order] = vocabulary.encode_integers(values[order], missing[order])
    return codes, hashes


def _encode_texts(vocabulary: Vocabulary, values: pa.Array, missing: Bools) -> tuple[Int64s, Int64s]:
    # The known texts by code, over the vocabulary's own memory.
    buffers = [None, *(pa.py_buffer(vocabulary.tensors[part]) for part in ("offsets", "blob"))]
    known = pa.Array.from_buffers(pa.large_string(), len(vocabulary), buffers)
    place = pc.index_in(values, value_set=known).cast(pa.int64()).fill_null(UNKNOWN - FIRST_KNOWN)
    codes = np.where(missing, MISSING, place.to_numpy() + FIRST_KNOWN)
    hashes = vocabulary.hash_of_code[codes]
    unknown = np.flatnonzero(codes == UNKNOWN)
    hashes[unknown] = hash_texts(*_texts(values.take(pa.array(unknown))), vocabulary.seed)
    return codes, hashes


def _texts(values: pa.Array) -> tuple[UInt8s, Int64s]:
    """Blob and offsets of a large_string array that is not a slice of another."""
    _, offsets, blob = values.buffers()
    ends = np.frombuffer(offsets, dtype=np.int64, count=len(values) + 1)
    text = np.frombuffer(blob, dtype=np.uint8, count=ends[-1]) if ends[-1] else np.zeros(0, dtype=np.uint8)
    return text, ends
