"""An exception that nobody expected, as the log may have it: where and what it was, and not what a caller sent."""

import traceback
from collections.abc import Iterator

# Their texts quote the value that was wrong (a KeyError its key, pydantic's ValidationError the input), and that may be
# a user's history. Those of others, such as torch's RuntimeError with its shapes, are what whoever is on call needs.
QUOTE_VALUES = (ValueError, LookupError)


def describe(error: BaseException) -> str:
    """The traceback with everything that led to it, oldest first."""
    return "".join(_lines(error)).rstrip()


def _lines(error: BaseException) -> Iterator[str]:
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None:
        yield from _lines(before)
        yield "\nThen:\n\n"
    yield "Traceback (most recent call last):\n"
    yield from traceback.format_tb(error.__traceback__)
    kind = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    yield f"{kind}: {'(left out: it may quote the request)' if isinstance(error, QUOTE_VALUES) else error}\n"
