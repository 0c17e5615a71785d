"""How the service is: what /livez and /readyz say beyond the model and the store."""

import asyncio
import logging
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass
class Health:
    """One per service. `draining` is set by whoever stops it, `dead` when a background task ends by itself."""

    draining: bool = False
    dead: bool = False

    def background_ended(self, task: "asyncio.Task[None]") -> None:
        """A task that should run until the service stops did not: nothing but a new process mends that.

        Without this, every request would wait for its deadline while the probes go on saying that all is well.
        """
        self.dead = True
        error = None if task.cancelled() else task.exception()
        logger.critical(
            "the %s ended, and /livez fails from now on: restart the service", task.get_name(), exc_info=error
        )
