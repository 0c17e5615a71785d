"""Whether to send requests here, in one word: for /readyz and for the health routes of the inference protocol."""

from typing import Literal

from service.publication.follow import ModelFollower
from service.publication.health import Health

Readiness = Literal["ready", "starting", "draining", "dead"]


def readiness(follower: ModelFollower, health: Health) -> Readiness:
    """A store that is down makes scores worse, and no other replica's better: the service stays ready."""
    if health.dead:
        return "dead"
    if health.draining:
        return "draining"
    return "ready" if follower.ready else "starting"
