from pathlib import Path

import pytest

from serve.contract.errors import SettingsError
from serve.settings import ModelSettings, ServeSettings


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


def test_a_variable_that_is_no_setting_is_refused_with_the_nearest() -> None:
    with pytest.raises(SettingsError, match="MAX_WAITNG is no setting. Is FOCALPATH_MAX_WAITING m"):
        ModelSettings.from_environment({"FOCALPATH_MAX_WAITNG": "3"})
    with pytest.raises(SettingsError, match="FOCALPATH_XYZ is no setting. `python"):
        ModelSettings.from_environment({"FOCALPATH_XYZ": ""})


def test_what_kubernetes_sets_for_services_of_our_name_is_no_setting() -> None:
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
    assert ServeSettings.from_environment(variables) == ServeSettings()


def test_the_address_can_be_set_by_variables_too() -> None:
    settings = ServeSettings.from_environment(
        {"FOCALPATH_HOST": "127.0.0.2", "FOCALPATH_PORT": "8080"}
    )
    assert (settings.host, settings.port) == ("127.0.0.2", 8080)


def test_settings_of_the_service_are_no_mistake_where_only_the_model_runs() -> None:
    variables = {"FOCALPATH_WORKERS": "4", "FOCALPATH_THREADS": "2"}
    assert ModelSettings.from_environment(variables) == ModelSettings(threads=2)


def test_a_list_may_have_spaces() -> None:
    variables = {"FOCALPATH_ALLOWED_ORIGINS": "https://a.example, http://b:8080 ,"}
    origins = ServeSettings.from_environment(variables).allowed_origins
    assert origins == ("https://a.example", "http://b:8080")


@pytest.mark.parametrize("address", ["notaurl", "collector:4318", "http://", "ftp://host"])
def test_an_address_for_traces_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(SettingsError, match="otlp_endpoint is .* expected an address such as"):
        ServeSettings(otlp_endpoint=address)


@pytest.mark.parametrize("origin", ["dsa.example", "https://", "https://a/path", "null", " *"])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(SettingsError, match="allowed_origins has .*expected a scheme and a host"):
        ServeSettings(allowed_origins=(origin,))
