"""Whether the head of a cluster answers.

Without it Ray ends this process after a minute, with advice on logs that the user may not have.
"""

import socket
import threading
import time
from collections.abc import Callable

from serve.slides.errors import ClusterError

_EVERY_S = 2.0
_GIVE_UP_S = 30.0
"""Ray itself gives up after 60. A head that is started again in time is found again."""


class HeadWatch:
    """Checks every two seconds whether the head listens, in its own thread.

    Args:
        address: host:port of the head.
        tell: called with one line for the user.
    """

    def __init__(
        self,
        address: str,
        tell: Callable[[str], None],
        *,
        every_s: float = _EVERY_S,
        give_up_s: float = _GIVE_UP_S,
    ) -> None:
        self._address = address
        self._tell = tell
        self._every_s, self._give_up_s = every_s, give_up_s
        self._stop = threading.Event()
        self.error: ClusterError | None = None
        """Set once the head has not answered for too long."""
        self._thread = threading.Thread(target=self._run, name="head", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop looking."""
        self._stop.set()

    def _run(self) -> None:
        since: float | None = None
        while not self._stop.wait(self._every_s):
            try:
                check_listening(self._address, self._every_s)
            except OSError:
                now = time.monotonic()
                if since is None:
                    since = now
                    self._tell(
                        f"the head of the cluster at {self._address} does not answer; waiting "
                        f"{self._give_up_s:g} s for it"
                    )
                if now - since >= self._give_up_s:
                    self.error = ClusterError(
                        f"the head of the cluster at {self._address} has not answered for "
                        f"{self._give_up_s:g} s. Start the cluster again and give the same command "
                        "again, or the same without --cluster: finished blocks are kept."
                    )
                    return
            else:
                if since is not None:
                    since = None
                    self._tell("the head of the cluster answers again")


def check_listening(address: str, timeout_s: float) -> None:
    """Raise OSError if nothing listens at host:port."""
    host, _, port = address.rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s).close()
