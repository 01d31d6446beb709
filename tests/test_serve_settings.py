from pathlib import Path

import pytest

from serve.errors import SettingsError
from serve.settings import ServeSettings


def test_settings_survive_the_environment() -> None:
    settings = ServeSettings(
        bundle=Path("/models/one"), backend="triton", threads=3, triton_timeout_s=2.5
    )
    assert ServeSettings.from_environment(settings.to_environment()) == settings


def test_an_empty_environment_gives_the_defaults() -> None:
    assert ServeSettings.from_environment({"PATH": "/bin"}) == ServeSettings()


def test_a_variable_of_the_wrong_type_is_named() -> None:
    with pytest.raises(SettingsError, match="FOCALPATH_THREADS is 'many': Input should be a valid"):
        ServeSettings.from_environment({"FOCALPATH_THREADS": "many"})


def test_an_unknown_backend_is_refused_with_the_choices() -> None:
    with pytest.raises(SettingsError, match="FOCALPATH_BACKEND is 'cuda'.*'onnxruntime' or 'trit"):
        ServeSettings.from_environment({"FOCALPATH_BACKEND": "cuda"})


def test_a_value_out_of_range_is_refused() -> None:
    with pytest.raises(SettingsError, match="max_upload_mib is 0, expected a value from 1 to"):
        ServeSettings.from_environment({"FOCALPATH_MAX_UPLOAD_MIB": "0"})


def test_lists_and_paths_survive_the_environment() -> None:
    settings = ServeSettings(
        api_keys_file=Path("/keys"), allowed_origins=("https://a.example", "http://b:8080")
    )
    variables = settings.to_environment()
    assert variables["FOCALPATH_ALLOWED_ORIGINS"] == "https://a.example,http://b:8080"
    assert ServeSettings.from_environment(variables) == settings


def test_a_variable_that_is_set_to_nothing_keeps_its_default() -> None:
    variables = {"FOCALPATH_API_KEYS_FILE": "", "FOCALPATH_WORKERS": ""}
    assert ServeSettings.from_environment(variables) == ServeSettings()


@pytest.mark.parametrize("origin", ["dsa.example", "https://", "https://a/path", "null", " *"])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(SettingsError, match="allowed_origins has .*expected a scheme and a host"):
        ServeSettings(allowed_origins=(origin,))
