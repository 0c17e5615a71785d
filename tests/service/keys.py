"""API keys for tests: of the form of real ones, and the same in every process that runs some of the tests."""

import base64
import hashlib

from service.access.api_keys import PREFIX


def key_of(name: str) -> str:
    """The key that goes with a name."""
    return PREFIX + base64.urlsafe_b64encode(hashlib.sha256(name.encode()).digest()).decode().rstrip("=")
