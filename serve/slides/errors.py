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


def unreadable(path: Path, remedy: str) -> ResultError:
    """The error of a result's file that is there, but does not parse."""
    return ResultError(
        f"{path} is damaged, or was written by another version of FocalPath. {remedy}"
    )
