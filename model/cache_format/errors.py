"""What can be wrong with bytes that came out of the store.

ValueError
├── RecordError     one user's record: count it by `reason`, treat it as a miss, never score it
└── ManifestError   a manifest or an active pointer: nothing of that generation may be served
"""

from enum import StrEnum


class Reason(StrEnum):
    """Why a record was refused; the values are metric labels."""

    CORRUPT = "corrupt"
    FUTURE_VERSION = "future_version"
    FOREIGN_MODEL = "foreign_model"
    FOREIGN_GENERATION = "foreign_generation"
    FOREIGN_USER = "foreign_user"
    SHAPE = "shape"


class RecordError(ValueError):
    """A record that must not be scored."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ManifestError(ValueError):
    """A manifest or an active pointer that cannot be read; the message names the field."""
