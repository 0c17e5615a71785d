"""Plain values, as TOML and JSON give them, into a dataclass of options: strictly, and with messages in one wording.

Strictly: "3" and true are no whole numbers and 1 is no bool, for whoever wrote them meant something else. A whole
number passes for any number, a list for a tuple.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")
_WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "tuple_type": "a list",
}


def read_options(kind: type[Options], values: Mapping[str, Any], table: str = "") -> Options:
    """The options of these values. Raises ValueError naming the option as `table` and its name, found and wanted."""
    known = [field.name for field in dataclasses.fields(kind)]
    for name in values:
        if name not in known:
            raise ValueError(f"no option is called {table}{name}, the options are {', '.join(known)}")
    try:
        return TypeAdapter(kind).validate_json(json.dumps(dict(values), default=str), strict=True)
    except ValidationError as error:
        raise ValueError(_message(error.errors()[0], table)) from error


def _message(error: ErrorDetails, table: str) -> str:
    if error["type"] == "value_error":  # our own words, from __post_init__
        return str(error["ctx"]["error"])
    name, *places = error["loc"]
    option = table + str(name) + "".join(f"[{place}]" for place in places)
    wanted = error["ctx"]["expected"] if error["type"] == "literal_error" else _WANTED.get(error["type"], error["msg"])
    return f"{option} is {error['input']!r}: wanted {wanted}"
