"""What can go wrong in training and export, one class for each kind that a user can act on.

FocalPathError
├── SettingsError    a setting is unknown, out of its range, or does not fit another
├── BaselineError    a strategy needs a trained baseline, and none fits
├── RunError         a run cannot be resumed, or its loss is not a number
├── WeightsError     a file of published weights cannot be read, or does not fit the model
├── EncoderError     an encoder is unknown, or no vision transformer that the model can use
├── ImageFileError   an image of a data set cannot be read as what it shows
├── MaskError        a mask cannot be read, or holds what means no class
└── CheckpointError  a checkpoint is missing, damaged, or of another model or other classes
"""

from typing import ClassVar


class FocalPathError(ValueError):
    """A user's mistake: the message says what was found, what was expected, and what to do."""

    code: ClassVar[str] = "focalpath"
    """Short and stable name of the kind of error, for programs."""


class SettingsError(FocalPathError):
    """A setting is unknown, out of its range, or does not fit another."""

    code = "settings"


class BaselineError(FocalPathError):
    """A strategy needs a trained baseline, and none fits."""

    code = "baseline"


class RunError(FocalPathError):
    """A run cannot be resumed, or its loss is not a number."""

    code = "run"


class WeightsError(FocalPathError):
    """A file of published weights cannot be read, or does not fit the model."""

    code = "weights"


class EncoderError(FocalPathError):
    """An encoder is unknown, or no vision transformer that the model can use."""

    code = "encoder"


class ImageFileError(FocalPathError):
    """An image of a data set cannot be read as what it shows."""

    code = "image"


class MaskError(FocalPathError):
    """A mask cannot be read, or holds values or colours that mean no class."""

    code = "mask"


class CheckpointError(FocalPathError):
    """A checkpoint is missing, damaged, or of another model or other classes."""

    code = "checkpoint"
