"""What the columns of the files have to be, by what the model was trained on, and which files can be read so."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pyarrow as pa

from cache_builder.source import Source, SourceFile
from model.bundle import Bundle
from model.identifiers import IdKind
from model.log.parquet_columns import DataError, column_kind, plain_type

REQUIRED = ("user_id", "item_id", "timestamp")
_OPTIONAL = ("label", "in_history", "session_id")


@dataclass(frozen=True)
class Columns:
    """What the files' columns have to be: ids of the model's kinds, and the same optional columns in every file."""

    user_kind: IdKind
    item_kind: IdKind
    user_features: Mapping[str, IdKind]  # of the users table
    optional: tuple[str, ...] = ()

    def refusal(self, schema: pa.Schema) -> str | None:
        """Why a file of this schema cannot be read, None if it can."""
        for name in (*REQUIRED, *self.optional):
            if name not in schema.names:
                others = ", which other files have" if name in self.optional else ""
                return f"there is no column {name!r}{others}, found {schema.names}"
            if schema.names.count(name) > 1:
                return f"there are {schema.names.count(name)} columns {name!r}"
        for name, kind in (("user_id", self.user_kind), ("item_id", self.item_kind)):
            found = column_kind(plain_type(schema.field(name).type))
            if found != kind:
                held = f"{found}s" if found else str(schema.field(name).type)
                return f"{name} holds {held}, the model was trained on {kind}s"
        types = {name: plain_type(schema.field(name).type) for name in schema.names}
        if not pa.types.is_integer(types["timestamp"]):
            return f"timestamp is {types['timestamp']}, wanted an integer"
        label, flag = types.get("label", pa.int8()), types.get("in_history", pa.bool_())
        if not (pa.types.is_integer(label) or pa.types.is_boolean(label) or pa.types.is_null(label)):
            return f"label is {label}, wanted integers 1 and 0, or null"
        if not pa.types.is_boolean(flag):
            return f"in_history is {flag}, wanted a bool"
        if column_kind(types.get("session_id", pa.int64())) is None:
            return f"session_id is {types['session_id']}, wanted integers or strings"
        return None


def columns_of(source: Source, bundle: Bundle) -> Columns:
    """The columns that the files of a source have to have: an optional one that any of them has, all have to have.

    A file without it would have its rows read otherwise than the rest: one without labels as all clicks.
    """
    features = {name: vocabulary.kind for name, vocabulary in bundle.user_features.vocabularies.items()}
    columns = Columns(bundle.user_kind, bundle.item_kind, features)
    found = {name for file in source.interactions if not columns.refusal(file.schema) for name in file.schema.names}
    return replace(columns, optional=tuple(name for name in _OPTIONAL if name in found))


def readable(source: Source, columns: Columns) -> tuple[list[SourceFile], list[tuple[str, int, str]]]:
    """Files of interactions that can be read, and (name, rows, reason) of those that cannot.

    How many rows an unreadable file has is not known: it counts as many as the others have in so many bytes.
    Raises DataError where none can, or where the users table does not have what the model reads.
    """
    per_byte = source.rows / sum(file.size for file in source.interactions)
    refused = [
        (file.name, max(1, round(file.size * per_byte)), f"the file is not readable Parquet: {file.error}")
        for file in source.unreadable
    ]
    files = []
    for file in source.interactions:
        reason = columns.refusal(file.schema)
        if reason is None:
            files.append(file)
        else:
            refused.append((file.name, file.rows, reason))
    if not files:
        name, _, reason = refused[-1]
        raise DataError(f"{source.place}: {name}: {reason}: cast it, or give the data that the model was trained on")
    _check_users(source, columns)
    return files, refused


def _check_users(source: Source, columns: Columns) -> None:
    """Raise DataError unless the users table has the columns that the model reads."""
    wanted = dict(columns.user_features)
    if wanted and not source.users:
        raise DataError(f"{source.place} has no users.parquet, the model reads {list(wanted)} from it: add it")
    for file in source.users if wanted else ():
        for name, kind in ({"user_id": columns.user_kind} | wanted).items():
            if name not in file.schema.names:
                raise DataError(f"{file.name} has no column {name!r}, found {file.schema.names}: add it")
            found = plain_type(file.schema.field(name).type)
            if column_kind(found) != kind and not pa.types.is_null(found):
                raise DataError(f"{file.name}: column {name!r} is {found}, the model was trained on {kind}s: cast it")
