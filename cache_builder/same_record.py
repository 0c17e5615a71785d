"""Is a stored record the one that the data gives? All but the time at which it was built, and rounding, counts."""

from dataclasses import fields

import numpy as np

from model.cache_format import Precision, UserRecord

# Largest difference of a slot's values, as a part of the largest among them: rounding of the stored type, and room for
# another machine's order of summation.
TOLERANCE: dict[Precision, float] = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2, "int8": 6e-3}
SUMMATION_ERROR = 1e-6


def difference(found: UserRecord, wanted: UserRecord, precision: Precision) -> str | None:
    """The first field that differs, None where none does. `found` was stored in `precision`."""
    for field in fields(UserRecord):
        left, right = getattr(found, field.name), getattr(wanted, field.name)
        match field.name:
            case "built_at_ms":
                same = True
            case "keys_RD" | "values_RD":
                largest = np.abs(right).max(axis=1, initial=0, keepdims=True)
                same = bool((np.abs(left - right) <= largest * TOLERANCE[precision] + SUMMATION_ERROR).all())
            case _:
                same = bool(np.array_equal(left, right))
        if not same:
            return field.name
    return None
