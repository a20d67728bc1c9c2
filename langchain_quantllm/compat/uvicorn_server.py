"""A uvicorn server that says when it is asked to end.

Uses what uvicorn does not promise: that a server that ends, after a signal or `should_exit`, calls `shutdown` once,
before it waits for its requests.
"""

from __future__ import annotations

from collections.abc import Callable

import uvicorn


class SignalledServer(uvicorn.Server):
    """A server that calls `closing` once, on its event loop, when a signal or `stop` asks it to end."""

    def __init__(self, config: uvicorn.Config, *, closing: Callable[[float], None], closing_s: float) -> None:
        """Take the configuration.

        Args:
            config: uvicorn's.
            closing: Called with `closing_s`, before the server waits for its requests to end.
            closing_s: Seconds that they have.
        """
        super().__init__(config)
        self._closing = closing
        self._closing_s = closing_s

    def stop(self) -> None:
        """End, as after a signal."""
        self.should_exit = True

    async def shutdown(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """Say that it ends, then end."""
        self._closing(self._closing_s)
        await super().shutdown(sockets)  # type: ignore[arg-type]
