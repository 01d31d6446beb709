"""Finds a loss that is not a number without making a GPU wait."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from train.errors import RunError


class _Pending(NamedTuple):
    loss: Tensor
    """On the CPU, once `copied` has happened."""
    copied: torch.cuda.Event | None
    explain: Callable[[float], str]


class FiniteLosses:
    """Refuses a loss that is not finite: on a CPU at once, on a GPU one step later.

    To read a number from a GPU is to wait until it has done all that it was asked for, and only
    then to ask for more. So the number is copied while the GPU goes on, and read when the next one
    comes. Call `check` before anything is written, so that the last one counts, too.
    """

    def __init__(self) -> None:
        self._pending: _Pending | None = None

    def watch(self, loss: Tensor, explain: Callable[[float], str]) -> None:
        """Take a step's loss, a scalar; `explain` says what to tell of a value that is not finite.

        Raises:
            RunError: this loss, or on a GPU the one before, is not finite.
        """
        self.check()
        copied = None
        value = loss.detach().to("cpu", non_blocking=loss.is_cuda)
        if loss.is_cuda:
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        self._pending = _Pending(value, copied, explain)
        if copied is None:
            self.check()

    def check(self) -> None:
        """Look at the last loss.

        Raises:
            RunError: it is not finite.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if pending.copied is not None:
            pending.copied.synchronize()
        if not torch.isfinite(pending.loss):
            raise RunError(pending.explain(float(pending.loss)))
