"""The API key that the load test's programs ask with, where the service wants one: LREA_LOADTEST_API_KEY.

From the environment only: every user of a machine can read a command line.
"""

from collections.abc import Mapping

VARIABLE = "LREA_LOADTEST_API_KEY"


def key_headers(environ: Mapping[str, str]) -> dict[str, str]:
    """Headers of every request; none where no key is set."""
    key = environ.get(VARIABLE, "")
    return {"authorization": f"Bearer {key}"} if key else {}
