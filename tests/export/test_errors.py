from pathlib import Path

import pytest

from export import errors
from export.errors import (
    BundleError,
    FocalPathError,
    InputError,
    MissingRuntimeError,
    StorageError,
    errors_translated,
)
from serve.contract import errors as serve_errors
from tests.support.errors import raises
from train import errors as train_errors
from train.files import whole_file

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, FocalPathError)
]


def test_each_kind_has_a_code_of_its_own_and_the_module_lists_it() -> None:
    assert len({kind.code for kind in KINDS}) == len(KINDS) > 8
    listed = [line.split() for line in str(errors.__doc__).splitlines()]
    for kind in KINDS:
        assert any({kind.__name__, kind.code} <= set(words) for words in listed), kind


@pytest.mark.parametrize(
    ("foreign", "own"),
    [
        (serve_errors.BundleError("model.onnx is damaged"), BundleError),
        (serve_errors.BackendUnavailableError("no OpenVINO"), MissingRuntimeError),
        (serve_errors.ModelChangedError("another model"), MissingRuntimeError),
        (serve_errors.SettingsError("a setting"), InputError),
        (train_errors.CheckpointError("no checkpoint"), InputError),
        (train_errors.StorageError("a full disk"), StorageError),
        (PermissionError(13, "Permission denied", "file"), StorageError),
    ],
)
def test_errors_of_other_packages_become_our_own(
    foreign: Exception, own: type[FocalPathError]
) -> None:
    with raises(own, foreign) as caught, errors_translated():
        raise foreign
    assert caught.value.__cause__ is foreign


def test_a_file_that_train_cannot_write_is_a_fault_of_storage(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with raises(StorageError, tmp_path / "file"), errors_translated():  # noqa: SIM117
        with whole_file(tmp_path / "file" / "inside"):
            pass


def test_our_own_errors_pass_as_they_are() -> None:
    own = BundleError("damaged")
    with pytest.raises(BundleError) as caught, errors_translated():
        raise own
    assert caught.value is own
