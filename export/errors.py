"""What can go wrong in an export: one class, and one stable code, for each kind.

A program tells errors apart by `code`, which stays the same between versions. The message is for
people, and its words may change.

FocalPathError            failed
├── SettingsError         setting_invalid      a setting is out of range, or settings contradict
├── InputError            input_unusable       the checkpoint or the data set cannot be used
├── DestinationError      destination_taken    something else is where the result should go
├── StorageError          storage_failed       a file cannot be read or written
├── BundleError           bundle_unusable      the bundle is damaged, incomplete or too old
├── GraphError            graph_invalid        the model cannot be written as the graph needs it
├── GateError             gate_failed          an artefact does not answer as its reference does
├── EngineError           engine_failed        TensorRT cannot build or run the model
├── MissingRuntimeError   runtime_missing      a runtime that was asked for is not installed
└── WrongMachineError     machine_unsuitable   the engine cannot be built here (exit status 2)
"""

from collections.abc import Iterator
from contextlib import contextmanager

from serve.contract import errors as serve_errors
from train import errors as train_errors


class FocalPathError(Exception):
    """An error that the user can fix: it says what was found, what was expected, what to do.

    It is not a ValueError, which pydantic and tyro catch.
    """

    code = "failed"
    """Names the kind of error for programs."""
    exit_status = 1
    """Of the command line."""


class SettingsError(FocalPathError):
    """A setting is out of range, or settings contradict each other."""

    code = "setting_invalid"


class InputError(FocalPathError):
    """The checkpoint or the data set cannot be used."""

    code = "input_unusable"


class DestinationError(FocalPathError):
    """Something else is where the result should go."""

    code = "destination_taken"


class StorageError(FocalPathError):
    """A file or folder cannot be read or written."""

    code = "storage_failed"


class BundleError(FocalPathError):
    """The bundle is damaged, incomplete or written for another version."""

    code = "bundle_unusable"


class GraphError(FocalPathError):
    """The model cannot be written as the graph needs it."""

    code = "graph_invalid"


class GateError(FocalPathError):
    """An artefact does not answer as its reference does."""

    code = "gate_failed"


class EngineError(FocalPathError):
    """TensorRT cannot build or run the model; the message says what it reported."""

    code = "engine_failed"


class MissingRuntimeError(FocalPathError):
    """A runtime that was asked for is not installed, or not usable on this machine."""

    code = "runtime_missing"


class WrongMachineError(FocalPathError):
    """The engine cannot be built here; the message's last line is the command for where it can."""

    code = "machine_unsuitable"
    exit_status = 2


@contextmanager
def errors_translated() -> Iterator[None]:
    """Turn errors of `train`, `serve` and the operating system into those of this package.

    Every public function of the package that calls the other packages is wrapped in it, so that a
    caller of `export` catches one class.

    Raises:
        FocalPathError: with the message of the error that came.
    """
    try:
        yield
    except serve_errors.BundleError as error:
        raise BundleError(str(error)) from error
    except serve_errors.BackendUnavailableError as error:
        raise MissingRuntimeError(str(error)) from error
    except (serve_errors.FocalPathError, train_errors.FocalPathError) as error:
        is_storage = isinstance(error, train_errors.StorageError)
        raise (StorageError if is_storage else InputError)(str(error)) from error
    except OSError as error:
        raise StorageError(str(error)) from error
