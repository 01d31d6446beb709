"""What can go wrong with a slide's run, beside what its reader and the model raise."""

from serve.contract.errors import FocalPathError


class CohortError(FocalPathError):
    """The slides that were named cannot be worked on as they are."""

    code = "cohort_unusable"


class MaskError(FocalPathError):
    """The tissue mask or the regions of a slide cannot be used."""

    code = "mask_unusable"


class ResultError(FocalPathError):
    """The output folder holds something else than this run would continue."""

    code = "result_differs"


class ResultDamagedError(ResultError):
    """A finished result is not what was written."""

    code = "result_damaged"


class OutputError(FocalPathError):
    """An output cannot be written."""

    code = "output_failed"
