"""What can go wrong in training: one class, and one stable code, for each kind.

A program tells errors apart by `code`, which stays the same between versions. The message is for
people, and its words may change.

FocalPathError            focalpath
├── SettingsError         settings          a setting is unknown, out of range, or does not fit
├── DatasetError          dataset           a data set's folder, classes, folds or labels are wrong
├── ScaleError            scale             um per pixel are missing, absurd, or too coarse
├── ImageFileError        image             an image cannot be read
├── MaskError             mask              a mask cannot be read, or holds values without a class
├── SourceError           source            published files or slides are missing or incomplete
├── AnnotationError       annotation        annotations cannot be read, named or drawn
├── DestinationError      destination       something else is where the result should go
├── StorageError          storage           a place cannot be written, or its file is damaged
├── WeightsError          weights           a file of published weights does not fit
├── EncoderError          encoder           an encoder is unknown, or cannot be used here
├── CheckpointError       checkpoint        a checkpoint is missing, damaged, or does not fit
├── BaselineError         baseline          a strategy needs a trained baseline, and none fits
├── RunError              run               a run cannot be resumed, or its loss is not a number
│   └── CollapseError     collapse          the encoder that is pretrained has collapsed
└── MissingPackageError   package_missing   an optional package is not installed
"""


class FocalPathError(Exception):
    """An error that the user can fix: it says what was found, what was expected, what to do.

    Only the classes below are raised. It is not a ValueError, which pydantic and tyro catch.
    """

    code = "focalpath"
    """Names the kind of error for programs."""


class SettingsError(FocalPathError):
    """A setting is unknown, out of its range, or does not fit another setting or the data."""

    code = "settings"


class DatasetError(FocalPathError):
    """A data set's folder, dataset.json or folds.csv is wrong, or its labels cannot be used."""

    code = "dataset"


class ScaleError(FocalPathError):
    """The um per pixel of an image are missing, absurd, or too coarse for what is asked."""

    code = "scale"


class ImageFileError(FocalPathError):
    """An image cannot be read, is too large, or is not of its mask's size."""

    code = "image"


class MaskError(FocalPathError):
    """A mask cannot be read, or holds values or colours that stand for no class."""

    code = "mask"


class SourceError(FocalPathError):
    """Published files or slides are missing, incomplete, too small, or not as published."""

    code = "source"


class AnnotationError(FocalPathError):
    """Annotations cannot be read, their labels have no meaning, or a shape cannot be drawn."""

    code = "annotation"


class DestinationError(FocalPathError):
    """Something else is where the result should go."""

    code = "destination"


class StorageError(FocalPathError):
    """The disk is full, a place on it cannot be written, or a cached file is damaged."""

    code = "storage"


class WeightsError(FocalPathError):
    """A file of published weights cannot be read, or does not fit the model."""

    code = "weights"


class EncoderError(FocalPathError):
    """An encoder is unknown, or is not a vision transformer that can be used here."""

    code = "encoder"


class CheckpointError(FocalPathError):
    """A checkpoint is missing, damaged, or of another model or other classes."""

    code = "checkpoint"


class BaselineError(FocalPathError):
    """A strategy needs a trained baseline, and none fits."""

    code = "baseline"


class RunError(FocalPathError):
    """A run cannot be resumed, or its loss is not a number."""

    code = "run"


class CollapseError(RunError):
    """The encoder that is pretrained has collapsed: it answers the same for every view."""

    code = "collapse"


class MissingPackageError(FocalPathError):
    """An optional package that a setting asks for is not installed."""

    code = "package_missing"
