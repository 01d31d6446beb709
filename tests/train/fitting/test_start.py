import pytest

import train.fitting.start
from tests.support.errors import raises
from tests.support.toy_data import toy_settings
from train.errors import SettingsError
from train.fitting.start import find_start
from train.model.segmenter import Segmenter

pytestmark = pytest.mark.slow


def test_a_model_that_is_too_large_to_be_exported_is_refused_before_training(
    monkeypatch: pytest.MonkeyPatch,
):
    settings = toy_settings()
    segmenter = Segmenter(settings.model, 5)
    num_parameters = sum(value.numel() for value in segmenter.state_dict().values())
    monkeypatch.setattr(train.fitting.start, "MAX_WEIGHTS_BYTES", 4 * num_parameters - 1)
    with raises(SettingsError, "--no-exportable"):
        find_start(settings).load(segmenter, ())
    allowed = toy_settings(runtime={"exportable": False})
    assert not find_start(allowed).load(segmenter, ())
    monkeypatch.setattr(train.fitting.start, "MAX_WEIGHTS_BYTES", 4 * num_parameters)
    assert not find_start(settings).load(segmenter, ())
