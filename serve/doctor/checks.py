"""The doctor's checks: one function per subject. They report problems, and never raise for them."""

import shutil
import tempfile
import time
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from serve.contract.errors import FocalPathError
from serve.contract.machine import Machine, installed_versions
from serve.contract.manifest import Manifest, read_bundle
from serve.contract.strict import Strict
from serve.inference.backend import first_line
from serve.inference.probe import PROVIDERS, probe
from serve.inference.segmenter import open_segmenter
from serve.inference.triton import TritonBackend, version_on_triton
from serve.service.page import LIBRARY_FILE
from serve.service.start import START_CHECKS
from serve.settings import MEBIBYTE, ServeSettings

NEEDED = ("numpy", "pillow", "bentoml", "fastapi", "shapely", "tritonclient")
OPTIONAL = {
    "openvino": "openvino",
    "OTLP exporter": "opentelemetry-exporter-otlp-proto-http",
    "pyspng": "pyspng-seunglab",
}
"""Optional packages of serving, by the name shown."""
RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
SLIDE_MODULES = {
    "openslide": "openslide-python",
    "tifffile": "tifffile",
    "imagecodecs": "imagecodecs",
    "zarr": "zarr",
    "pydicom": "pydicom",
    "highdicom": "highdicom",
}
"""Modules that read and write whole slides, and their packages."""
_RESULT_MIB = 1024
"""Room for the work and the result of one large slide (our estimate)."""
TENSORRT_PACKAGES = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")


Status = Literal["ok", "absent", "warning", "failed"]
"""`absent`: missing, but not needed with these settings."""


class Finding(Strict):
    """The result of one check."""

    section: str
    name: str
    status: Status
    detail: str


class Report(Strict):
    """The results of all checks."""

    machine: Machine
    findings: tuple[Finding, ...]

    @property
    def failed(self) -> tuple[Finding, ...]:
        """The checks that failed: with them the service would not answer."""
        return tuple(finding for finding in self.findings if finding.status == "failed")


def look(settings: ServeSettings, machine: Machine) -> Iterator[Finding]:
    """Run all checks, in the order in which they are read."""
    yield from look_at_machine(machine)
    yield from look_at_packages()
    yield from look_at_providers(settings)
    yield from look_at_slides(settings)
    yield from look_at_places(settings)
    manifest, finding = look_at_bundle(settings)
    yield finding
    if manifest is not None:
        yield from look_at_warm_up(settings, manifest)
    yield from look_at_triton(settings, manifest)
    yield from look_at_start(settings, manifest)


def look_at_machine(machine: Machine) -> Iterator[Finding]:
    """The processor, the memory and the GPUs."""
    yield _found("Machine", "system", f"{machine.system}, Python {machine.python}")
    yield _found("Machine", "processor", machine.processor.title)
    memory = "" if machine.memory_gib is None else f", {machine.memory_gib:.1f} GiB of memory"
    yield _found("Machine", "CPUs", f"{machine.num_cpus} that this process may use{memory}")
    for gpu in machine.gpus:
        yield _found(
            "Machine",
            "GPU",
            f"{gpu.name}, {gpu.memory_mib / 1024:.0f} GiB, compute capability "
            f"{gpu.compute_capability}, driver {gpu.driver}",
        )
    if not machine.gpus:
        yield _found("Machine", "GPU", "nvidia-smi shows none", "absent")


def look_at_packages() -> Iterator[Finding]:
    """The versions of what serving needs and of what it can use."""
    found = installed_versions((*NEEDED, *OPTIONAL.values(), *RUNTIMES, *TENSORRT_PACKAGES))
    yield _found("Packages", "focalpath", version("focalpath"))
    for name in NEEDED:
        detail = found.get(name, "not installed")
        yield _found("Packages", name, detail, "ok" if name in found else "failed")
    runtimes = [name for name in RUNTIMES if name in found]
    detail = ", ".join(f"{name} {found[name]}" for name in runtimes) or "not installed"
    if len(runtimes) == 2:
        detail += ": they share one import name; remove one of them"
    status: Status = "ok" if len(runtimes) == 1 else "failed"
    yield _found("Packages", "onnxruntime", detail, status)
    for name, package in OPTIONAL.items():
        yield _optional("Packages", name, found.get(package))
    tensorrt = next((f"{name} {found[name]}" for name in TENSORRT_PACKAGES if name in found), None)
    yield _optional("Packages", "tensorrt", tensorrt)


def look_at_providers(settings: ServeSettings) -> Iterator[Finding]:
    """Run a tiny graph on each provider, each in another process."""
    for provider in PROVIDERS:
        found = probe(provider)
        is_needed = settings.backend == "onnxruntime" and provider in ("cpu", settings.provider)
        if found.problem is None:
            detail = f"{found.runtime}; started and ran a tiny graph in {found.seconds:.1f} s"
            yield _found("Providers", provider, detail)
        else:
            yield _found("Providers", provider, found.problem, "failed" if is_needed else "absent")


def look_at_slides(settings: ServeSettings) -> Iterator[Finding]:
    """Import the libraries for whole slides: OpenSlide's needs more than its Python package."""
    for module, package in SLIDE_MODULES.items():
        try:
            loaded = import_module(module)
            detail = installed_versions((package,)).get(package, "there")
            if library := getattr(loaded, "__library_version__", ""):
                detail += f", with OpenSlide {library}"
                from serve.images.readers.openslide import check_openslide_version

                check_openslide_version(library)
            yield _found("Slides", module, detail)
        except ModuleNotFoundError:
            yield _found("Slides", module, "not installed", "absent")
        except FocalPathError as error:  # an OpenSlide that readers refuse
            yield _found("Slides", module, str(error), "warning")
        except (ImportError, OSError) as error:
            yield _found("Slides", module, f"it does not load: {first_line(error)}", "warning")
    if LIBRARY_FILE.is_file():
        yield _found("Slides", "OpenSeadragon", "installed")
    else:
        status: Status = "absent" if settings.slides is None else "warning"
        detail = "not installed, so the page shows no slides; `make page` installs it"
        yield _found("Slides", "OpenSeadragon", detail, status)


def look_at_places(settings: ServeSettings) -> Iterator[Finding]:
    """The folders that the service writes to: temporary files, tensors for Triton, and results."""
    places = {"temporary files": Path(tempfile.gettempdir())}
    if settings.backend == "triton" and settings.triton_shared_memory != "off":
        places["shared memory"] = Path("/dev/shm")
    if settings.slides_out_folder is not None:
        # It is made at the start, if it is missing: what counts is the folder to make it in.
        out = settings.slides_out_folder.absolute()
        places["results of slides"] = next(one for one in (out, *out.parents) if one.exists())
    for name, folder in places.items():
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(4096))
            free_mib = shutil.disk_usage(folder).free // MEBIBYTE
        except OSError as error:
            detail = f"{folder} cannot be written to: {error.strerror or error}"
            yield _found("Places", name, detail, "failed")
            continue
        needed = settings.max_batch_mib
        detail = f"{folder}, {free_mib:,} MiB free"
        is_small = False
        if name == "temporary files" and free_mib < needed:
            is_small = True
            detail += f"; one /batch may take {needed:,} (--max-batch-mib)"
        elif name == "results of slides" and free_mib < _RESULT_MIB:
            is_small = True
            detail += f"; one large slide may take {_RESULT_MIB:,}"
        yield _found("Places", name, detail, "warning" if is_small else "ok")


def look_at_bundle(settings: ServeSettings) -> tuple[Manifest | None, Finding]:
    """The bundle's manifest and checksums."""
    try:
        manifest = read_bundle(settings.bundle)
    except FocalPathError as error:
        return None, _found("Bundle", "files", str(error), "failed")
    files = ", ".join(artefact.file for artefact in manifest.artefacts)
    detail = f"{settings.bundle}: {manifest.name} {manifest.version}; checksums right of {files}"
    return manifest, _found("Bundle", "files", detail)


def look_at_warm_up(settings: ServeSettings, manifest: Manifest) -> Iterator[Finding]:
    """Open the model as the service does, compare the warm-up image, and time a tile."""
    started = time.perf_counter()
    try:
        segmenter = open_segmenter(settings, manifest)
    except FocalPathError as error:
        name = "warm-up" if error.code == "warm_up_differs" else "runs on"
        yield _found("Bundle", name, str(error), "failed")
        return
    with segmenter:
        ready_s = time.perf_counter() - started
        runs_on = segmenter.runs_on
        assert runs_on is not None, "`open_segmenter` says so"
        detail = f"{runs_on.title}, {runs_on.runtime}: {runs_on.reason}"
        yield _found("Bundle", "runs on", detail)
        try:
            started = time.perf_counter()
            segmenter.warm_up()
            tile_s = time.perf_counter() - started
        except FocalPathError as error:
            yield _found("Bundle", "warm-up", str(error), "failed")
            return
    compared = "the warm-up image has the export's labels"
    if manifest.warm_up is None:
        compared = "the bundle has no warm-up image to compare with"
    yield _found(
        "Bundle",
        "warm-up",
        f"{compared}; ready after {ready_s:.1f} s, one tile takes {tile_s:.3g} s",
    )


def look_at_triton(settings: ServeSettings, manifest: Manifest | None) -> Iterator[Finding]:
    """Whether Triton answers and serves the bundle's model, if the settings name a Triton."""
    is_needed = settings.backend == "triton"
    is_named = settings.triton_url != ServeSettings.model_fields["triton_url"].default
    if not (is_needed or is_named):
        yield _found("Triton", "server", "the settings name none", "absent")
        return
    if manifest is None:
        yield _found("Triton", "model", "not asked for: there is no bundle", "warning")
        return
    try:
        backend = TritonBackend(settings.triton_url, manifest, shared_memory="off")
        number = version_on_triton(settings, manifest)
        backend.close()
    except FocalPathError as error:
        yield _found("Triton", "model", str(error), "failed" if is_needed else "warning")
        return
    detail = f"{settings.triton_url} serves {manifest.name}, Triton's version {number}"
    yield _found("Triton", "model", detail)


def look_at_start(settings: ServeSettings, manifest: Manifest | None) -> Iterator[Finding]:
    """Run the checks that `python -m serve http` runs before it starts."""
    if manifest is None:
        yield _found("Start", "bundle", "the bundle cannot be used, see above", "failed")
    for name, check in START_CHECKS.items():
        if manifest is None and name == "precision":  # is about the bundle's files
            continue
        try:
            check(settings, manifest)
        except (FocalPathError, ValueError) as error:
            yield _found("Start", name, str(error), "failed")
        else:
            yield _found("Start", name, "accepted")


def _found(section: str, name: str, detail: str, status: Status = "ok") -> Finding:
    return Finding(section=section, name=name, status=status, detail=detail)


def _optional(section: str, name: str, found: str | None) -> Finding:
    return _found(section, name, found or "not installed", "ok" if found else "absent")
