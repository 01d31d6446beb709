"""Everything that can be set about serving, from the environment or the command line."""

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, Self

from pydantic import TypeAdapter, ValidationError

from serve.contract.errors import SettingsError

ENVIRONMENT_PREFIX = "FOCALPATH_"
MEBIBYTE = 2**20
MEGAPIXEL = 10**6
PILLOW_LIMIT_MEGAPIXELS = 178
"""Above this Pillow itself refuses an image as a decompression bomb."""
Provider = Literal["auto", "cpu", "cuda", "openvino"]
SharedMemory = Literal["auto", "on", "off"]
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.\[\]:-]+")
_URL = re.compile(r"https?://[^\s/]+\S*")
_LISTS = ("allowed_origins",)
_NOT_SETTINGS = ("artifacts", "model_repository", "tensorrt_cache", "triton_cache")
"""Read by compose and by tests."""
_SERVICE_LINK = re.compile(
    r"(\w+_)?(service_host|service_port(_\w+)?|port_\d+_(tcp|udp|sctp)(_\w+)?)"
)


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What runs the model, and how large an image may be; also read from FOCALPATH_<NAME>."""

    bundle: Path = Path("artifacts/bundle")
    """Folder of the bundle that `python -m export` wrote."""
    backend: Literal["onnxruntime", "triton"] = "onnxruntime"
    """Where the model runs: in this process by ONNX Runtime, or on a Triton server over gRPC."""
    precision: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"
    """Which of the bundle's ONNX files ONNX Runtime opens."""
    provider: Provider = "auto"
    """What computes. auto: CUDA where ONNX Runtime has it, else the CPU. openvino: OpenVINO on the
    CPU, for the fp32 and bf16 graphs of a bundle that was exported with --openvino."""
    threads: int = 0
    """CPU threads for one inference of ONNX Runtime; 0 lets it take one a core."""
    triton_url: str = "127.0.0.1:8001"
    """host:port of Triton's gRPC endpoint."""
    triton_timeout_s: float = 30.0
    """Seconds to wait for one answer of Triton."""
    triton_shared_memory: SharedMemory = "auto"
    """Pass tensors to Triton through /dev/shm, and where that fails over gRPC. auto: where its
    address is this machine's loopback."""
    max_upload_mib: int = 64
    """Largest image file in MiB; larger ones are refused (HTTP 413)."""
    max_image_megapixels: int = 64
    """Largest image in megapixels, judged from its header; larger ones are refused (HTTP 413)."""
    max_batch_size: int = 0
    """Most tiles, also of different requests, in one batch of ONNX Runtime; 0: the model's own."""
    batch_delay_ms: float = 2.0
    """Milliseconds that a tile waits for others to share its batch."""
    parallel_batches: int = 1
    """Batches of ONNX Runtime at the same time. Where an image is many tiles, a CPU does more with
    one a core, --threads 1 and --max-batch-size 1; an image of one tile then takes longer."""

    def __post_init__(self) -> None:
        self._check_ranges(
            threads=(0, 1024),
            triton_timeout_s=(0.001, 86_400),
            max_upload_mib=(1, 4096),
            max_image_megapixels=(1, PILLOW_LIMIT_MEGAPIXELS),
            max_batch_size=(0, 1024),
            batch_delay_ms=(0, 1000),
            parallel_batches=(1, 256),
        )

    def _check_ranges(self, **ranges: tuple[float, float]) -> None:
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise SettingsError(f"{name} is {value}, expected a value from {low} to {high}.")

    @property
    def max_upload_bytes(self) -> int:
        """Largest upload in bytes."""
        return self.max_upload_mib * MEBIBYTE

    @property
    def max_image_pixels(self) -> int:
        """Largest image in pixels."""
        return self.max_image_megapixels * MEGAPIXEL

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Read the settings from FOCALPATH_* variables; what is not set keeps its default.

        Raises:
            SettingsError: a variable is no setting, cannot be read as its setting's type or is out
                of range.
        """
        found = _variables(environment)
        given: dict[str, object] = {
            name: _as_list(found[name]) if name in _LISTS else found[name]
            for name in (field.name for field in fields(cls))
            if found.get(name)  # what is set to nothing keeps its default
        }
        try:
            return TypeAdapter(cls).validate_python(given)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0]) if first["loc"] else ""
            reason = first["msg"].removeprefix("Value error, ")
            if not name:  # from __post_init__, which names the setting itself
                raise SettingsError(reason) from error
            raise SettingsError(
                f"{ENVIRONMENT_PREFIX}{name.upper()} is {found[name]!r}: {reason}."
            ) from error

    def to_environment(self) -> dict[str, str]:
        """The variables from which `from_environment` reads these settings again."""
        return {
            f"{ENVIRONMENT_PREFIX}{field.name.upper()}": _as_text(getattr(self, field.name))
            for field in fields(self)
        }


@dataclass(frozen=True, kw_only=True)
class ServeSettings(ModelSettings):
    """Settings of the HTTP service; each is also read from FOCALPATH_<NAME>."""

    host: str = "127.0.0.1"
    """IP address to listen at; beyond this machine only with --api-keys-file."""
    port: int = 3000
    """TCP port to listen at."""
    workers: int = 1
    """Processes that answer requests; each opens its own model."""
    concurrency: int = 2
    """Images that one process works on at the same time; further requests wait."""
    max_waiting: int = 32
    """Requests of one process at work or waiting; beyond it they get HTTP 429."""
    request_timeout_s: float = 300.0
    """Seconds after which a request gets HTTP 504."""
    max_batch_files: int = 256
    """Most files of one /batch, those in zips included; more get HTTP 413."""
    max_batch_mib: int = 512
    """Largest /batch in MiB, as it is sent and as its zips unpack; larger ones get HTTP 413. It is
    kept in temporary files while it is worked on."""
    api_keys_file: Path | None = None
    """File of API keys, a line `name:key` or `name:sha256:<hex>` each; read again when it changes.
    Callers send `Authorization: Bearer KEY` or `X-API-Key: KEY`."""
    insecure_no_key: bool = False
    """Listen beyond this machine although no --api-keys-file is set."""
    allowed_origins: tuple[str, ...] = ()
    """Origins whose pages may call the service from a browser (CORS), such as https://dsa.example;
    separated by commas in the environment."""
    bundle_poll_s: float = 5.0
    """Seconds between looks for a new version of the bundle in its folder; 0: never look."""
    triton_load: bool = False
    """Tell Triton to load the model when the bundle is new: for --model-control-mode=explicit."""
    log_format: Literal["json", "text"] = "json"
    """How the log is written: an object a line, or text."""
    otlp_endpoint: str = ""
    """Where traces are sent (OTLP over HTTP), such as http://collector:4318/v1/traces; needs the
    extra `tracing`. Empty: nowhere."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_ranges(
            max_batch_files=(1, 65_536),
            max_batch_mib=(1, 1_048_576),
            workers=(1, 256),
            concurrency=(1, 1024),
            max_waiting=(1, 100_000),
            request_timeout_s=(0.001, 86_400),
            bundle_poll_s=(0, 86_400),
        )
        for origin in self.allowed_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise SettingsError(
                    f"allowed_origins has {origin!r}, expected a scheme and a host, such as "
                    "https://dsa.example:8080, or *."
                )
        if self.otlp_endpoint and not _URL.fullmatch(self.otlp_endpoint):
            raise SettingsError(
                f"otlp_endpoint is {self.otlp_endpoint!r}, expected an address such as "
                "http://collector:4318/v1/traces."
            )


def _variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The values of FOCALPATH_* variables by the name of their setting."""
    names = [field.name for field in fields(ServeSettings)]
    found = {}
    for variable, value in environment.items():
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        if name == variable.lower() or name in _NOT_SETTINGS or _is_service_link(name, value):
            continue
        if name not in names:
            nearest = difflib.get_close_matches(name, names, n=1)
            hint = f" Is {ENVIRONMENT_PREFIX}{nearest[0].upper()} meant?" if nearest else ""
            raise SettingsError(
                f"{variable} is no setting.{hint} `python -m serve http --help` lists all."
            )
        found[name] = value
    return found


def _is_service_link(name: str, value: str) -> bool:
    """Whether Kubernetes or Docker made the variable, for a service called focalpath-something."""
    is_address = name.endswith("port") and value.startswith(("tcp://", "udp://", "sctp://"))
    return is_address or _SERVICE_LINK.fullmatch(name) is not None


def _as_list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _as_text(value: object) -> str:
    if value is None:
        return ""
    return ",".join(value) if isinstance(value, tuple) else str(value)
