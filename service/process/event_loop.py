"""The event loop that a service runs on: uvloop's, which ends TLS connections within a second."""

from typing import Any

import uvloop

# uvloop's own is 30 s. A caller who keeps his connection for another request answers its end only then: one idle caller
# would hold up a service that stops, for all of its grace.
TLS_SHUTDOWN_S = 1.0


class EventLoop(uvloop.Loop):
    """Uvicorn asks it to listen, and has no setting for this."""

    async def create_server(self, *arguments: Any, ssl: Any = None, **options: Any) -> Any:
        if ssl is not None:
            options["ssl_shutdown_timeout"] = TLS_SHUTDOWN_S
        return await super().create_server(*arguments, ssl=ssl, **options)
