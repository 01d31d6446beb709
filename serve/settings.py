"""All settings of serving, from the environment or the command line."""

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator
from pydantic_settings import EnvSettingsSource, NoDecode

from serve.contract.errors import SettingsError
from serve.contract.machine import visible_gpus
from serve.contract.manifest import MAX_BATCH_SIZE
from serve.contract.strict import CommandOptions

ENVIRONMENT_PREFIX = "FOCALPATH_"
MEBIBYTE = 2**20
MEGAPIXEL = 10**6
PILLOW_LIMIT_MEGAPIXELS = 178
"""Above this Pillow itself refuses an image as a decompression bomb."""
DAY_S = 86_400
Provider = Literal["auto", "cpu", "cuda", "openvino"]
SharedMemory = Literal["auto", "on", "off"]
_ORIGIN = re.compile(r"\*|https?://[A-Za-z0-9.\[\]:-]+")
_NOT_SETTINGS = (
    "artifacts",
    "model_repository",
    "shared_data",
    "tensorrt_cache",
    "triton_cache",
)
"""Read by compose and by tests."""
_SERVICE_LINK = re.compile(
    r"(\w+_)?(service_host|service_port(_\w+)?|port_\d+_(tcp|udp|sctp)(_\w+)?)"
)


class InferenceSettings(CommandOptions):
    """What runs the model, and how large an image may be; also read from FOCALPATH_<NAME>."""

    bundle: Path = Path("artifacts/bundle")
    """Folder of the bundle that `python -m export` wrote."""
    backend: Literal["onnxruntime", "triton"] = "onnxruntime"
    """Where the model runs: onnxruntime: in this process, by ONNX Runtime or OpenVINO; triton: on a
    Triton server, asked over gRPC."""
    precision: Literal["auto", "fp32", "fp16", "bf16", "int8"] = "fp32"
    """Which of the bundle's ONNX files runs in this process. auto: the fastest here of those that
    passed the export's gate; its labels may then differ a little between machines."""
    provider: Provider = "auto"
    """What computes in this process. auto: the fastest here, timed on one tile at the start, of
    those that passed the export's gate. cpu, cuda: ONNX Runtime. openvino: OpenVINO on the CPU, for
    bundles exported with --openvino. GET /runtime tells which it is."""
    threads: int = Field(0, ge=0, le=1024)
    """CPU threads for one inference in this process; 0: one per core that it may use."""
    triton_url: str = "127.0.0.1:8001"
    """host:port of Triton's gRPC endpoint."""
    triton_timeout_s: float = Field(30.0, ge=0.001, le=DAY_S)
    """Seconds to wait for one answer of Triton."""
    triton_shared_memory: SharedMemory = "auto"
    """Pass tensors to Triton through /dev/shm, and where that fails over gRPC. auto: only if its
    address is this machine's loopback."""
    max_upload_mib: int = Field(64, ge=1, le=4096)
    """Largest image file in MiB; larger ones are refused (HTTP 413)."""
    max_image_megapixels: int = Field(64, ge=1, le=PILLOW_LIMIT_MEGAPIXELS)
    """Largest image in megapixels, as its header says; larger ones are refused (HTTP 413)."""
    max_image_tiles: int = Field(0, ge=0, le=10**6)
    """Most tiles of one image, after it is resampled to the model's um per pixel. Larger images are
    refused before any tile is computed (HTTP 413). 0: no limit besides max_image_megapixels. Set it
    to what the machine can compute within request_timeout_s."""
    max_batch_size: int = Field(0, ge=0, le=MAX_BATCH_SIZE)
    """Most tiles in one batch, also of different requests; 0: as many as the model takes."""
    batch_delay_ms: float = Field(2.0, ge=0, le=1000)
    """Milliseconds that a tile waits for others to share its batch."""
    parallel_batches: int = Field(1, ge=1, le=256)
    """Batches that run at the same time. On a CPU, images of many tiles finish sooner with one
    batch per core, --threads 1 and --max-batch-size 1; an image of one tile then takes longer."""

    @property
    def max_upload_bytes(self) -> int:
        """Largest upload in bytes."""
        return self.max_upload_mib * MEBIBYTE

    @property
    def max_image_pixels(self) -> int:
        """Largest image in pixels."""
        return self.max_image_megapixels * MEGAPIXEL

    @classmethod
    def from_environment(cls) -> Self:
        """Read the settings from FOCALPATH_* variables; what is not set keeps its default.

        Raises:
            SettingsError: a variable is not a setting, has the wrong type or is out of range.
        """
        _check_names()
        # It reads from the class no more than any model has.
        source = _Variables(cls, env_prefix=ENVIRONMENT_PREFIX, env_ignore_empty=True)  # type: ignore[arg-type]
        found = source()
        return cls.model_validate(found, context={"name_of": _as_variable})

    def to_environment(self) -> dict[str, str]:
        """The variables from which `from_environment` reads these settings again."""
        return {_as_variable(name): _as_text(value) for name, value in dict(self).items()}


class ServeSettings(InferenceSettings):
    """Settings of the HTTP service; each is also read from FOCALPATH_<NAME>."""

    host: str = "127.0.0.1"
    """IP address to listen at; beyond this machine only with --api-keys-file."""
    port: int = Field(3000, ge=0, le=65_535)
    """TCP port to listen at."""
    root_path: str = Field("", pattern=r"^(/[A-Za-z0-9._~-]+)*$")
    """Path under which a reverse proxy publishes the service, such as /focalpath. The proxy may
    keep it or strip it."""
    workers: int = Field(1, ge=1, le=256)
    """Processes that answer requests; each opens its own model."""
    concurrency: int = Field(0, ge=0, le=1024)
    """Images that one process works on at the same time; further requests wait. 0: 2, or 8 with a
    GPU or Triton, which would idle while so few are decoded and encoded."""
    max_waiting: int = Field(32, ge=1, le=100_000)
    """Requests of one process at work or waiting, their bodies complete; further ones get HTTP
    429."""
    max_waiting_tiles: int = Field(1024, ge=4, le=10**7)
    """Tiles of the images of one process at work or waiting; images beyond them get HTTP 429, with
    Retry-After from the measured speed. A quarter is kept for small images, of at most 1/32 of it;
    a larger image than all of them is taken where no other large one waits."""
    max_uploads: int = Field(256, ge=1, le=100_000)
    """Requests of one process whose bodies are still arriving, beside those of max_waiting; further
    ones get HTTP 429. A body of more than 4 MiB is in a temporary file until it is complete."""
    request_timeout_s: float = Field(300.0, ge=0.001, le=DAY_S)
    """Seconds after which a request gets HTTP 504."""
    keep_results_mib: int = Field(256, ge=0, le=1_048_576)
    """MiB of memory of one process for the last results of requests with `X-Keep-Result: yes`, such
    as the page's: its downloads then do not run the model again. 0: none is kept."""
    max_batch_files: int = Field(256, ge=1, le=65_536)
    """Most files of one /batch, those in zips included; more get HTTP 413."""
    max_batch_mib: int = Field(512, ge=1, le=1_048_576)
    """Largest /batch in MiB, as it is sent and as its zips unpack; larger ones get HTTP 413. It is
    kept in temporary files while it is worked on."""
    api_keys_file: Path | None = None
    """File of API keys, one `name:key` or `name:sha256:<hex>` per line; read again when it changes.
    Callers send `Authorization: Bearer KEY` or `X-API-Key: KEY`."""
    insecure_no_key: bool = False
    """Listen beyond this machine although no --api-keys-file is set."""
    allowed_origins: Annotated[tuple[str, ...], NoDecode] = ()
    """Origins whose pages may call the service from a browser (CORS), such as https://dsa.example;
    separated by commas in the environment."""
    slides: Path | None = None
    """Folder of whole slides that the page shows and segments, with the folders in it. Needs the
    extra `slides`."""
    slides_out: Path | None = None
    """Folder of the slides' results and jobs, as `--out` of `python -m serve slides run`. By
    default a folder beside --slides, its name with `-results`."""
    slide_readers: int = Field(2, ge=1, le=64)
    """Processes that read slides for the page, beside each of --workers."""
    slide_jobs: int = Field(1, ge=1, le=64)
    """Slides that are segmented at the same time, each by a process with a model of its own."""
    max_slide_jobs: int = Field(32, ge=1, le=100_000)
    """Slides that may wait to be segmented; further jobs get HTTP 429."""
    bundle_poll_s: float = Field(5.0, ge=0, le=DAY_S)
    """Seconds between looks for a new version of the bundle in its folder; 0: never look."""
    triton_load: bool = False
    """Tell Triton to load the model when the bundle is new: for --model-control-mode=explicit."""
    log_format: Literal["json", "text"] = "json"
    """How the log is written: one JSON object per line, or text."""
    otlp_endpoint: str = Field("", pattern=r"^(https?://[^\s/]+\S*)?$")
    """Where traces are sent (OTLP over HTTP), such as http://collector:4318/v1/traces; needs the
    extra `tracing`. Empty: nowhere."""

    @property
    def images_at_once(self) -> int:
        """Images that one process works on at the same time; may ask the GPU's driver."""
        if self.concurrency:
            return self.concurrency
        has_device = self.backend == "triton" or (
            self.provider in ("auto", "cuda") and bool(visible_gpus())
        )
        return 8 if has_device else 2

    @property
    def slides_out_folder(self) -> Path | None:
        """Where the slides' results go; None without --slides."""
        if self.slides is None or self.slides_out is not None:
            return self.slides_out
        return self.slides.with_name(f"{self.slides.name}-results")

    @field_validator("allowed_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """Read a list in one variable."""
        if not isinstance(value, str):
            return value
        return tuple(part.strip() for part in value.split(",") if part.strip())

    @field_validator("allowed_origins")
    @classmethod
    def _check_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin!r} is not an origin; expected a scheme and a host, such as "
                    "https://dsa.example:8080, or *"
                )
        return value


class _Variables(EnvSettingsSource):
    """pydantic-settings' values of the environment, without those that an orchestrator made."""

    def __call__(self) -> dict[str, Any]:
        """The values by the name of their setting."""
        return {name: v for name, v in super().__call__().items() if not _is_service_link(name, v)}


def _check_names() -> None:
    """Raise SettingsError for a FOCALPATH_ variable that is not a setting."""
    names = list(ServeSettings.model_fields)
    for variable, value in os.environ.items():
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        is_other = name == variable.lower() or name in _NOT_SETTINGS
        if is_other or name in names or _is_service_link(name, value):
            continue
        nearest = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {ENVIRONMENT_PREFIX}{nearest[0].upper()}?" if nearest else ""
        raise SettingsError(
            f"{variable} is not a setting.{hint} `python -m serve http --help` lists all."
        )


def _is_service_link(name: str, value: object) -> bool:
    """Whether Kubernetes or Docker made the variable, for a service called focalpath-something."""
    is_address = name.endswith("port") and str(value).startswith(("tcp://", "udp://", "sctp://"))
    return is_address or _SERVICE_LINK.fullmatch(name) is not None


def _as_variable(name: str) -> str:
    return ENVIRONMENT_PREFIX + name.upper()


def _as_text(value: object) -> str:
    if value is None:
        return ""
    return ",".join(value) if isinstance(value, tuple) else str(value)
