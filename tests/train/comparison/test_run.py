from pathlib import Path

import pytest

from tests.support.errors import raises
from train.comparison.run import _read_leverage
from train.errors import StorageError


@pytest.mark.parametrize("content", ["", "{}", '[{"tile": 3}]'])
def test_damaged_measurements_of_the_bias_are_one_line_with_the_file(content: str, tmp_path: Path):
    path = tmp_path / "leverage.json"
    path.write_text(content)
    with raises(StorageError, path, "run the comparison again") as refused:
        _read_leverage(path)
    assert "\n" not in str(refused.value)
