"""Everything that can be set about serving, from the environment or the command line."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, Self

from pydantic import TypeAdapter, ValidationError

from serve.errors import SettingsError

ENVIRONMENT_PREFIX = "FOCALPATH_"
MEBIBYTE = 2**20
MEGAPIXEL = 10**6
PILLOW_LIMIT_MEGAPIXELS = 178
"""Above this Pillow itself refuses an image as a decompression bomb."""


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Settings of a serving process; each is also read from FOCALPATH_<NAME>."""

    bundle: Path = Path("artifacts/bundle")
    """Folder of the bundle that `python -m export` wrote."""
    backend: Literal["onnxruntime", "triton"] = "onnxruntime"
    """Where the model runs: in this process by ONNX Runtime, or on a Triton server over gRPC."""
    precision: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"
    """Which of the bundle's ONNX files ONNX Runtime opens."""
    threads: int = 0
    """CPU threads for one inference of ONNX Runtime; 0 lets it take one a core."""
    triton_url: str = "127.0.0.1:8001"
    """host:port of Triton's gRPC endpoint."""
    triton_timeout_s: float = 30.0
    """Seconds to wait for one answer of Triton."""
    max_upload_mib: int = 64
    """Largest upload in MiB; larger ones get HTTP 413."""
    max_image_megapixels: int = 64
    """Largest image in megapixels, judged from its header; larger ones get HTTP 413."""
    workers: int = 1
    """Processes that answer requests; each opens its own model."""
    concurrency: int = 2
    """Images that one process works on at the same time; further requests wait."""
    max_waiting: int = 32
    """Requests of one process at work or waiting; beyond it they get HTTP 429."""
    request_timeout_s: float = 300.0
    """Seconds after which a request gets HTTP 504."""

    def __post_init__(self) -> None:
        ranges: dict[str, tuple[float, float]] = {
            "threads": (0, 1024),
            "triton_timeout_s": (0.001, 86_400),
            "max_upload_mib": (1, 4096),
            "max_image_megapixels": (1, PILLOW_LIMIT_MEGAPIXELS),
            "workers": (1, 256),
            "concurrency": (1, 1024),
            "max_waiting": (1, 100_000),
            "request_timeout_s": (0.001, 86_400),
        }
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
            SettingsError: a variable cannot be read as its setting's type or is out of range.
        """
        names = {f"{ENVIRONMENT_PREFIX}{field.name.upper()}": field.name for field in fields(cls)}
        found = {name: environment[key] for key, name in names.items() if key in environment}
        try:
            return TypeAdapter(cls).validate_python(found)
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
            f"{ENVIRONMENT_PREFIX}{field.name.upper()}": str(getattr(self, field.name))
            for field in fields(self)
        }
