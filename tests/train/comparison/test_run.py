import errno
from pathlib import Path

import pytest

from tests.support.errors import raises
from tests.support.locks import break_locks
from tests.support.toy_data import toy_settings
from train.comparison.methods import BASELINE
from train.comparison.run import RowRun, _read_leverage
from train.errors import StorageError


@pytest.mark.parametrize("content", ["", "{}", '[{"tile": 3}]'])
def test_damaged_measurements_of_the_bias_are_one_line_with_the_file(content: str, tmp_path: Path):
    path = tmp_path / "leverage.json"
    path.write_text(content)
    with raises(StorageError, path, "run the comparison again") as refused:
        _read_leverage(path)
    assert "\n" not in str(refused.value)


def test_a_row_counts_as_free_where_the_file_system_has_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    break_locks(monkeypatch, errno.ENOLCK)
    with RowRun(BASELINE, 0, toy_settings(), tmp_path, "").lock(wait=False) as free:
        assert free
