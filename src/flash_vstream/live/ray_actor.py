"""What runs in an actor of Ray: a host of ``hosts``, whose worker process begins its imports before the actor's own.

Both take seconds, so nothing that is slow to import may be imported here.
"""

from typing import Any

from flash_vstream.live.fork_server import end_fork_server, ensure_fork_server
from flash_vstream.models.choice import ModelChoice


class HostActor:
    """The host of a ``kind``, ``FrameHost`` or ``QuestionHost``. Any thread may call it."""

    def __init__(self, kind: str, model: ModelChoice):
        ensure_fork_server(model)
        from flash_vstream.live import hosts

        self._host = getattr(hosts, kind)(model)

    def call(self, method: str, *arguments: Any) -> Any:
        """The value of the host's method."""
        return getattr(self._host, method)(*arguments)

    def end(self) -> None:
        """End all but the actor itself, which Ray kills."""
        self._host.close()
        end_fork_server()
