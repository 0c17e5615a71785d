"""The contract between the cache's builder and the service: keys, user records, manifest and active pointer.

Bytes and strings only: nothing here knows the store, the model or the network. docs/record-format.md is the
specification; tests/model/cache_format/test_golden.py pins it.
"""

from model.cache_format.errors import ManifestError, Reason, RecordError
from model.cache_format.keys import (
    MAX_USER_BYTES,
    active_key,
    check_model_id,
    check_prefix,
    deleting_key,
    generation_prefix,
    held_key,
    is_model_id,
    lease_member,
    leases_key,
    lock_key,
    manifest_key,
    new_generation,
    record_key,
    retired_key,
    unpublished_key,
    user_from_key,
    user_from_text,
    user_in_key,
)
from model.cache_format.manifest import ActivePointer, Manifest, Published
from model.cache_format.pair import PRECISIONS, Precision
from model.cache_format.record import FORMAT_VERSION, UserRecord, decode, encode, reissue
from model.cache_format.shape import RecordShape

__all__ = [
    "FORMAT_VERSION",
    "MAX_USER_BYTES",
    "PRECISIONS",
    "ActivePointer",
    "Manifest",
    "ManifestError",
    "Precision",
    "Published",
    "Reason",
    "RecordError",
    "RecordShape",
    "UserRecord",
    "active_key",
    "check_model_id",
    "check_prefix",
    "decode",
    "deleting_key",
    "encode",
    "generation_prefix",
    "held_key",
    "is_model_id",
    "lease_member",
    "leases_key",
    "lock_key",
    "manifest_key",
    "new_generation",
    "record_key",
    "reissue",
    "retired_key",
    "unpublished_key",
    "user_from_key",
    "user_from_text",
    "user_in_key",
]
