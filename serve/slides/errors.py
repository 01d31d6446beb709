"""What can go wrong in a run of slides, besides the errors of readers and of the model."""

from pathlib import Path

from serve.contract.errors import FocalPathError


class ExtraMissingError(FocalPathError):
    """A package that slides need is not installed."""

    code = "extra_missing"


class CohortError(FocalPathError):
    """The named slides cannot be used as they are."""

    code = "cohort_unusable"


class MaskError(FocalPathError):
    """The tissue mask or the regions of a slide cannot be used."""

    code = "mask_unusable"


class ResultError(FocalPathError):
    """The output folder holds something that this run cannot continue."""

    code = "result_differs"


class ResultDamagedError(ResultError):
    """A finished result differs from what was written."""

    code = "result_damaged"


class OutputError(FocalPathError):
    """An output cannot be written."""

    code = "output_failed"


class ClusterError(FocalPathError):
    """The cluster cannot be reached, or no machine has room for a worker."""

    code = "cluster_unusable"


class WorkerDiedError(ClusterError):
    """The processes that computed a slide died each time."""

    code = "worker_died"


class WorkerFailedError(ClusterError):
    """A worker raised an unexpected error."""

    code = "worker_failed"


def unreadable(path: Path, remedy: str) -> ResultError:
    """The error of a result's file that is there, but does not parse."""
    return ResultError(
        f"{path} is damaged, or was written by another version of FocalPath. {remedy}"
    )
