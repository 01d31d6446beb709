"""How long, and how often, a client repeats a request to a server that cannot answer it now.

A request changes nothing on the server, so it can be sent any number of times.
"""

import time

FIRST_PAUSE_S = 1.0
"""Pause before the second attempt, unless the server names one. Each further pause is doubled."""
MAX_FAILURES = 4
"""A client gives up after this many failures in a row to reach the server or its model."""


class Patience:
    """Decides after each failed attempt how long to wait for the next one.

    Args:
        seconds: time for all attempts together.
    """

    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        self._pause_s = FIRST_PAUSE_S
        self._num_failures = 0

    def after_refusal(self, asked_s: float = 0.0) -> float | None:
        """Seconds to wait after a busy server's refusal; None if the time does not suffice.

        Args:
            asked_s: the pause that the server asks for; 0 if it names none.
        """
        pause_s = asked_s or self._pause_s
        self._pause_s *= 2
        return None if time.monotonic() + pause_s > self._deadline else pause_s

    def after_failure(self, asked_s: float = 0.0) -> float | None:
        """Seconds to wait after the server or its model was not there; None to give up.

        Args:
            asked_s: the pause that the server asks for; 0 if it names none.
        """
        self._num_failures += 1
        return None if self._num_failures >= MAX_FAILURES else self.after_refusal(asked_s)
