import os
from pathlib import Path
from typing import Any

import pytest

from serve.contract.errors import SettingsError
from serve.contract.machine import Gpu
from serve.settings import ENVIRONMENT_PREFIX, InferenceSettings, ServeSettings
from tests.support.errors import raises


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(ENVIRONMENT_PREFIX):
            monkeypatch.delenv(name)


def _set(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name if name.startswith("FOCALPATH") else f"FOCALPATH_{name}", value)


@pytest.mark.parametrize(
    "settings",
    [
        ServeSettings(),
        ServeSettings(
            bundle=Path("/models/one"), backend="triton", threads=3, triton_timeout_s=2.5
        ),
        ServeSettings(
            api_keys_file=Path("/keys"), allowed_origins=("https://a.example", "http://b:8080")
        ),
        ServeSettings(insecure_no_key=True, root_path="/path/to", workers=2),
    ],
)
def test_settings_survive_the_environment(
    settings: ServeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    _set(monkeypatch, settings.to_environment())
    assert ServeSettings.from_environment() == settings


def test_settings_made_by_a_program_do_not_read_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _set(monkeypatch, {"THREADS": "3"})
    assert ServeSettings().threads == 0
    assert ServeSettings.from_environment().threads == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("THREADS", "many"),
        ("BACKEND", "cuda"),
        ("MAX_UPLOAD_MIB", "0"),
        ("PORT", "70000"),
        ("REQUEST_TIMEOUT_S", "nan"),
        ("INSECURE_NO_KEY", "perhaps"),
        ("ROOT_PATH", "focalpath"),
        ("ROOT_PATH", "/focalpath/"),
        ("OTLP_ENDPOINT", "collector:4318"),
        ("OTLP_ENDPOINT", "http://"),
        ("ALLOWED_ORIGINS", "https://a.example,https://a/path"),
        ("ALLOWED_ORIGINS", "null"),
    ],
)
def test_a_variable_that_cannot_be_used_is_named_with_its_value(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _set(monkeypatch, {name: value})
    with raises(SettingsError, f"FOCALPATH_{name} is {value!r}"):
        ServeSettings.from_environment()


def test_a_variable_that_is_set_to_nothing_keeps_its_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _set(monkeypatch, {"API_KEYS_FILE": "", "WORKERS": "", "ALLOWED_ORIGINS": ""})
    assert ServeSettings.from_environment() == ServeSettings()


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [("MAX_WAITNG", "FOCALPATH_MAX_WAITING"), ("XYZ", "python -m serve http --help")],
)
def test_a_variable_that_is_no_setting_is_refused_with_the_nearest(
    variable: str, nearest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _set(monkeypatch, {variable: "3"})
    with raises(SettingsError, f"FOCALPATH_{variable}", nearest):
        InferenceSettings.from_environment()


def test_what_kubernetes_sets_for_services_of_our_name_is_no_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    variables = {
        "FOCALPATH_PORT": "tcp://10.0.0.1:80",
        "FOCALPATH_PORT_80_TCP": "tcp://10.0.0.1:80",
        "FOCALPATH_PORT_80_TCP_ADDR": "10.0.0.1",
        "FOCALPATH_PORT_80_TCP_PROTO": "tcp",
        "FOCALPATH_SERVICE_HOST": "10.0.0.1",
        "FOCALPATH_SERVICE_PORT": "80",
        "FOCALPATH_SERVICE_PORT_HTTP": "80",
        "FOCALPATH_TRITON_PORT": "tcp://10.0.0.2:8001",
        "FOCALPATH_TRITON_SERVICE_HOST": "10.0.0.2",
    }
    _set(monkeypatch, variables)
    assert ServeSettings.from_environment() == ServeSettings()


def test_settings_of_the_service_are_no_mistake_where_only_the_model_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _set(monkeypatch, {"WORKERS": "4", "THREADS": "2"})
    assert InferenceSettings.from_environment() == InferenceSettings(threads=2)


def test_a_list_may_have_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, {"ALLOWED_ORIGINS": "https://a.example, http://b:8080 ,"})
    origins = ServeSettings.from_environment().allowed_origins
    assert origins == ("https://a.example", "http://b:8080")


@pytest.mark.parametrize("name", ["thread", "Threads"])
def test_a_setting_that_is_misspelt_in_a_program_is_refused(name: str) -> None:
    with raises(SettingsError, f"--{name}"):
        ServeSettings(**{name: 1})


@pytest.mark.parametrize(
    ("given", "gpus", "expected"),
    [
        ({}, 0, 2),
        ({}, 1, 8),
        ({"provider": "cuda"}, 1, 8),
        ({"provider": "cpu"}, 1, 2),
        ({"provider": "openvino"}, 1, 2),
        ({"backend": "triton"}, 0, 8),
        ({"concurrency": 3}, 1, 3),
    ],
)
def test_more_images_are_at_work_where_the_model_needs_no_cpu(
    given: dict[str, Any], gpus: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(name="one", compute_capability="9.0", memory_mib=1, driver="1")
    monkeypatch.setattr("serve.settings.visible_gpus", lambda: (gpu,) * gpus)
    assert ServeSettings(**given).images_at_once == expected
