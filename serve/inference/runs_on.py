"""What the model runs on, as the service reports it."""

from serve.contract.strict import Strict


class Trial(Strict):
    """One provider that was tried on this machine."""

    provider: str
    precision: str
    is_proven: bool
    """Whether the export's gate proved it on this kind of processor."""
    seconds: float | None = None
    """Time for one tile; None where it did not run."""
    label_agreement: float | None = None
    """Share of the warm-up image's labels that are those of the export."""
    problem: str | None = None
    """Why it was rejected; None where it ran, even if another was faster."""


class RunsOn(Strict):
    """What runs the model, and why."""

    provider: str
    """`cpu`, `cuda`, `openvino` or `triton`."""
    precision: str | None
    """Of the file that runs; None for Triton, which chooses by itself."""
    runtime: str
    """Name and version."""
    processor: str
    """Name and kind of this machine's processor."""
    reason: str
    trials: tuple[Trial, ...] = ()
