"""What is deployed, checked without an engine: schemas, and that the parts fit each other."""

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from serve.settings import ENVIRONMENT_PREFIX, ServeSettings
from tests.support.deployed import DEPLOY

COMPOSE_FILES = sorted(DEPLOY.glob("compose*.yaml"))
KUBERNETES = DEPLOY / "kubernetes"
KUBERNETES_VERSION = "1.34"
NOT_MANIFESTS = ("kustomization.yaml", "prometheus-adapter-values.yaml")
MANIFESTS = [p for p in sorted(KUBERNETES.glob("*.yaml")) if p.name not in NOT_MANIFESTS]
LARGEST_IMAGE_MIB, IDLE_WORKER_MIB = 1200, 400
"""Memory of 64 megapixels and five classes at work as an overlay, and of a worker without: as
measured, rounded up."""
PINNED = re.compile(r"[a-z0-9./-]+:[a-z]?\d[\w.-]*")


class _ComposeLoader(yaml.SafeLoader):
    """Reads compose's own tags, which say how a file is merged with the one before."""


_ComposeLoader.add_constructor("!override", lambda loader, node: loader.construct_sequence(node))


def _compose(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.load(path.read_text(), _ComposeLoader)
    return loaded


def _manifest(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((KUBERNETES / f"{name}.yaml").read_text())
    return loaded


def _containers() -> dict[str, dict[str, Any]]:
    pod = _manifest("deployment")["spec"]["template"]["spec"]
    return {container["name"]: container for container in pod["containers"]}


def _settings(environment: dict[str, str]) -> ServeSettings:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        return ServeSettings.from_environment()


def _environment_of(container: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container["env"]}


@pytest.mark.parametrize("path", COMPOSE_FILES, ids=lambda path: path.name)
def test_compose_files_follow_their_schema(path: Path) -> None:
    vendored = files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json"
    schema = json.loads(vendored.read_text(encoding="utf-8"))
    jsonschema.validate(_compose(path), schema)


def test_the_compose_schema_would_notice_a_mistake() -> None:
    vendored = files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json"
    wrong = {"services": {"serve": {"image": "a:1", "port": ["3000:3000"]}}}
    with pytest.raises(jsonschema.ValidationError, match="port"):
        jsonschema.validate(wrong, json.loads(vendored.read_text(encoding="utf-8")))


def test_every_service_of_compose_is_pinned_hardened_and_watched() -> None:
    for name, service in _compose(DEPLOY / "compose.yaml")["services"].items():
        assert PINNED.fullmatch(service["image"]), name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        # The service's user and check are its image's.
        assert name == "serve" or (service["user"][0] != "0" and "healthcheck" in service), name


def test_compose_listens_on_this_machine_only_while_no_key_is_asked_for() -> None:
    services = _compose(DEPLOY / "compose.yaml")["services"]
    assert services["serve"]["environment"]["FOCALPATH_INSECURE_NO_KEY"] == "true"
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_compose_opened_to_others_asks_for_a_key() -> None:
    opened = _compose(DEPLOY / "compose.keys.yaml")
    environment = opened["services"]["serve"]["environment"]
    assert environment["FOCALPATH_INSECURE_NO_KEY"] == "false"
    assert environment["FOCALPATH_API_KEYS_FILE"] == "/run/secrets/api_keys"
    assert opened["services"]["serve"]["secrets"] == list(opened["secrets"])


def test_what_compose_mounts_of_this_repository_is_there() -> None:
    for service in _compose(DEPLOY / "compose.yaml")["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (DEPLOY / source).exists(), volume


def test_prometheus_asks_the_services_of_compose_at_their_ports() -> None:
    jobs = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    targets = [t for job in jobs for config in job["static_configs"] for t in config["targets"]]
    assert targets == ["serve:3000", "triton:8002"]
    assert {target.split(":")[0] for target in targets} <= set(
        _compose(DEPLOY / "compose.yaml")["services"]
    )


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_kubernetes_manifests_follow_their_schemas(path: Path) -> None:
    documents = list(yaml.safe_load_all(path.read_text()))
    assert documents
    for document in documents:
        kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)


def test_the_kubernetes_schema_would_notice_a_mistake() -> None:
    wrong = _manifest("service")
    wrong["spec"]["port"] = 80
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES_VERSION, strict=True)


def test_the_kustomization_lists_every_manifest() -> None:
    assert sorted(_manifest("kustomization")["resources"]) == [path.name for path in MANIFESTS]


def test_every_container_is_limited_probed_and_without_privileges() -> None:
    for name, container in _containers().items():
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] is True, name
        assert context["allowPrivilegeEscalation"] is False, name
        assert context["capabilities"] == {"drop": ["ALL"]}, name
        assert context["runAsUser"] > 0, name
        assert {"startupProbe", "readinessProbe", "livenessProbe"} < set(container), name
        assert "memory" in container["resources"]["limits"], name
    assert _containers()["triton"]["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_a_pod_holds_all_that_it_takes_at_the_same_time() -> None:
    settings = _settings(_environment_of(_containers()["serve"]))
    num_waiting = settings.workers * settings.max_waiting
    at_work = settings.workers * settings.images_at_once * LARGEST_IMAGE_MIB
    idle = settings.workers * IDLE_WORKER_MIB
    memory = _mebibytes(_containers()["serve"]["resources"]["limits"]["memory"])
    assert num_waiting * (settings.max_upload_mib + 1) + at_work + idle <= memory
    volumes = _manifest("deployment")["spec"]["template"]["spec"]["volumes"]
    (limit,) = [v["emptyDir"]["sizeLimit"] for v in volumes if v["name"] == "serve-tmp"]
    assert num_waiting * settings.max_batch_mib <= _mebibytes(limit)


def _mebibytes(quantity: str) -> int:
    assert quantity.endswith("Gi")
    return 1024 * int(quantity.removesuffix("Gi"))


def test_a_pod_outlives_its_longest_request() -> None:
    pod = _manifest("deployment")["spec"]["template"]["spec"]
    drained_s = _containers()["serve"]["lifecycle"]["preStop"]["sleep"]["seconds"]
    longest_s = ServeSettings().request_timeout_s + drained_s
    assert pod["terminationGracePeriodSeconds"] > longest_s


def test_the_kubernetes_service_and_autoscaler_find_the_deployment() -> None:
    deployment = _manifest("deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for selector in (
        deployment["spec"]["selector"]["matchLabels"],
        _manifest("service")["spec"]["selector"],
        _manifest("disruption-budget")["spec"]["selector"]["matchLabels"],
        _manifest("network-policy")["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    target = _manifest("autoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    ports = {port["name"] for port in _containers()["serve"]["ports"]}
    assert {port["targetPort"] for port in _manifest("service")["spec"]["ports"]} <= ports


def test_pods_ask_for_a_key() -> None:
    environment = _environment_of(_containers()["serve"])
    folder, _, file = environment["FOCALPATH_API_KEYS_FILE"].rpartition("/")
    mounts = {mount["mountPath"]: mount["name"] for mount in _containers()["serve"]["volumeMounts"]}
    assert mounts[folder] == file == "api-keys"


@pytest.mark.parametrize(
    "environment",
    [
        *(
            pytest.param(service.get("environment", {}), id=f"{path.name}-{name}")
            for path in COMPOSE_FILES
            for name, service in _compose(path)["services"].items()
        ),
        pytest.param(_environment_of(_containers()["serve"]), id="kubernetes"),
    ],
)
def test_every_setting_that_is_deployed_is_one_of_the_service(environment: dict[str, str]) -> None:
    settings = {
        name: "" if "${" in value else value
        for name, value in environment.items()
        if name.startswith(ENVIRONMENT_PREFIX)
    }
    names = {f"{ENVIRONMENT_PREFIX}{name.upper()}" for name in ServeSettings.model_fields}
    assert set(settings) <= names
    _settings(settings)


def test_the_inference_service_of_kserve_names_what_its_runtime_needs() -> None:
    service = yaml.safe_load((DEPLOY / "kserve/inference-service.yaml").read_text())
    assert set(service) == {"apiVersion", "kind", "metadata", "spec"}
    assert service["apiVersion"] == "serving.kserve.io/v1beta1"
    predictor = service["spec"]["predictor"]
    assert set(predictor) == {"minReplicas", "maxReplicas", "model"}
    model = predictor["model"]
    # The fields of KServe's ModelSpec, and of the container that it extends, that are used here.
    assert set(model) == {
        "modelFormat",
        "runtime",
        "protocolVersion",
        "storageUri",
        "ports",
        "resources",
    }
    claim = _manifest("storage")["metadata"]["name"]
    assert model["storageUri"] == f"pvc://{claim}/model_repository"
    assert model["resources"]["limits"]["nvidia.com/gpu"] == "1"
