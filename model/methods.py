"""The methods that are compared, each as the model options that make it, so that they differ in them and nothing else.

A name stands for the method as published; with the suffix `_match` the ranker has the match features as well.
"""

from typing import Any

MATCH_SUFFIX = "_match"
DEFAULT_METHOD = "lrea_match"

_AS_PUBLISHED: dict[str, dict[str, Any]] = {
    "item_only": {"long_attention": "none", "short_attention": False},
    "din_short": {"long_attention": "none"},
    "din_long": {"long_attention": "din"},
    "din_long_softmax": {"long_attention": "din", "din_softmax": True},
    "sim": {"long_attention": "sim-hard"},
    "sim_soft": {"long_attention": "sim-soft"},
    "eta": {"long_attention": "eta"},
    "sdim": {"long_attention": "sdim"},
    "twin": {"long_attention": "twin"},
    "lrea": {"long_attention": "lrea"},
    "lrea_paper": {"long_attention": "lrea", "form": "paper", "blocks": "fixed"},
}
METHODS = [*_AS_PUBLISHED, *(name + MATCH_SUFFIX for name in _AS_PUBLISHED)]


def method_options(name: str, *, categories: bool = True) -> dict[str, Any]:
    """Model options of a method. Raises ValueError for a name that is none.

    categories: whether items have a category to search by; where they have none, `sim` is the soft search.
    """
    base = name.removesuffix(MATCH_SUFFIX)
    if base not in _AS_PUBLISHED:
        raise ValueError(
            f"no method is called {name!r}: the methods are {', '.join(_AS_PUBLISHED)}, "
            f"each also with the suffix {MATCH_SUFFIX}"
        )
    if base == "sim" and not categories:
        base = "sim_soft"
    return {**_AS_PUBLISHED[base], "match": name.endswith(MATCH_SUFFIX)}
