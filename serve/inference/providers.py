"""Chooses what runs the model in this process: the provider in the settings, or the fastest one.

A provider may run a file of the bundle if it passed the export's gate with that file. A pass on
one kind of processor does not count on another. There the provider must first reproduce the labels
of the bundle's warm-up image, as closely as the gate requires of that precision. `auto` tries every
provider that may run here, and takes the fastest.
"""

import logging
from collections.abc import Iterator
from functools import partial

import onnxruntime

from serve.contract import cuda, openvino
from serve.contract.cpu_quota import cpu_quota
from serve.contract.errors import BundleError
from serve.contract.machine import this_processor
from serve.contract.manifest import Artefact, Manifest
from serve.inference.backend import Backend, RunsOn, Trial, onnx_artefact
from serve.inference.onnxruntime import OnnxRuntimeBackend
from serve.inference.openvino import OpenVinoBackend, openvino_precision
from serve.inference.trial import (
    Candidate,
    agreement,
    fastest,
    in_words,
    shared_trials,
    too_few_labels,
    try_on,
    warm_up_tile,
)
from serve.settings import InferenceSettings

TF32_AGREEMENT = 0.995
"""Share of the labels that CUDA must reproduce in float32, the same as for fp16: it multiplies
float32 as TF32, whose mantissa has 10 bits, as fp16's has."""
_log = logging.getLogger(__name__)


def open_in_process(
    settings: InferenceSettings, manifest: Manifest, before: RunsOn | None = None
) -> tuple[Backend, RunsOn]:
    """Open the provider that the settings name, or the fastest that may run here.

    Args:
        settings: name the bundle, the provider and the precision.
        manifest: the bundle's.
        before: what the previous version of the model runs on. It is used again if allowed, since a
            trial would slow down the requests in progress.

    Raises:
        BundleError: the bundle lacks the file, or the chosen provider may not run it.
        BackendUnavailableError: the chosen provider is not available on this machine.
    """
    candidates = candidates_for(settings, manifest)
    if len(candidates) == 1:
        is_named = settings.provider != "auto"
        reason = "it is what the settings name" if is_named else "nothing else may run here"
        return _open(settings, manifest, candidates[0], reason)
    by_title = {candidate.title: candidate for candidate in candidates}
    if before and before.title in by_title:
        return _open(settings, manifest, by_title[before.title], "the version before runs on it")
    key = (manifest.model_dump_json(), settings.provider, settings.precision, settings.threads)
    trials = shared_trials(key, lambda: _try_all(settings, manifest, candidates))
    chosen = by_title[fastest(trials).title]
    return _open(settings, manifest, chosen, f"the fastest here: {in_words(trials)}", trials)


def candidates_for(settings: InferenceSettings, manifest: Manifest) -> list[Candidate]:
    """List the files and providers that the settings allow on this machine; at least one.

    Raises:
        BundleError: no provider may run the bundle.
    """
    artefacts = [artefact for artefact in manifest.artefacts if artefact.format == "onnx"]
    if settings.precision != "auto":
        artefacts = [onnx_artefact(manifest, settings.precision)]
    if settings.provider == "openvino" and settings.precision != "auto":
        openvino_precision(artefacts[0])  # says why it may not
    found = [
        _candidate(settings, manifest, provider, artefact)
        for artefact in artefacts
        for provider in _providers(settings, artefact)
    ]
    if not found:
        precision = "any precision" if settings.precision == "auto" else settings.precision
        raise BundleError(
            f"the bundle has nothing in {precision} that may run on {_named(settings.provider)} "
            "here. Choose another FOCALPATH_PROVIDER or FOCALPATH_PRECISION; for OpenVINO export "
            "with --openvino, and install the extra `openvino`."
        )
    return found


def _providers(settings: InferenceSettings, artefact: Artefact) -> Iterator[str]:
    """Yield the providers that may run a file, out of those that the settings allow."""
    named, precision = settings.provider, artefact.precision
    if named in ("cpu", "cuda") and settings.precision != "auto":
        yield named  # an explicit choice needs no proof
        return
    has_gpu = named == "cuda" or (named == "auto" and cuda.is_built_in())
    if has_gpu and precision in ("fp32", "fp16"):
        yield "cuda"
    # A CPU computes fp16 in float32, with conversions on top.
    is_for_cpus = precision != "fp16" or settings.precision == "fp16"
    if named in ("auto", "cpu") and artefact.passed_with("cpu") and is_for_cpus:
        yield "cpu"
    if precision not in ("fp32", "bf16") or not artefact.passed_with("openvino"):
        return
    if named == "openvino" or (named == "auto" and openvino.problem(precision) is None):
        yield "openvino"


def _candidate(
    settings: InferenceSettings, manifest: Manifest, provider: str, artefact: Artefact
) -> Candidate:
    is_proven = artefact.is_proven(provider, this_processor().kind)
    least = manifest.warm_up.min_agreement if manifest.warm_up else 0.0
    if provider == "cuda":
        least = max(least, min(artefact.min_agreement or 0.0, TF32_AGREEMENT))
    elif provider == "openvino" and not is_proven:
        least = max(least, artefact.min_agreement or 0.0)
    return Candidate(
        provider=provider,
        precision=artefact.precision,
        is_proven=is_proven,
        min_agreement=least,
        open=partial(_open_backend, settings, manifest, provider, artefact.precision),
    )


def _open_backend(
    settings: InferenceSettings, manifest: Manifest, provider: str, precision: str
) -> Backend:
    threads = settings.threads or cpu_quota()
    if provider == "openvino":
        return OpenVinoBackend(
            settings.bundle,
            manifest,
            precision=precision,
            threads=threads,
            parallel=settings.parallel_batches,
        )
    return OnnxRuntimeBackend(
        settings.bundle,
        manifest,
        precision=precision,
        provider="cuda" if provider == "cuda" else "cpu",
        threads=threads,
    )


def _try_all(
    settings: InferenceSettings, manifest: Manifest, candidates: list[Candidate]
) -> list[Trial]:
    """Try the GPU. Try the CPU, which is never faster, only if the GPU fails."""
    trials: list[Trial] = []
    for is_gpu in (True, False):
        for candidate in candidates:
            if (candidate.provider == "cuda") == is_gpu:
                trials.append(try_on(candidate, settings.bundle, manifest))
        if any(trial.problem is None for trial in trials):
            break
    return trials


def _open(
    settings: InferenceSettings,
    manifest: Manifest,
    candidate: Candidate,
    reason: str,
    trials: list[Trial] | None = None,
) -> tuple[Backend, RunsOn]:
    backend = candidate.open()
    if trials is None and not candidate.is_proven and candidate.provider != "cpu":
        found = agreement(backend.infer, warm_up_tile(settings.bundle, manifest))
        if found is not None and found < candidate.min_agreement:
            backend.close()
            raise BundleError(
                f"{candidate.title} may not run here: "
                f"{too_few_labels(found, candidate.min_agreement)}. Choose FOCALPATH_PROVIDER=cpu."
            )
        checked = "no warm-up image to compare with"
        if found is not None:
            checked = f"{found:.3%} of the warm-up image's labels are the export's"
        reason += f"; the export's gate did not run on this kind of processor: {checked}"
    runs_on = RunsOn(
        provider=candidate.provider,
        precision=candidate.precision,
        runtime=_runtime(candidate.provider),
        processor=this_processor().title,
        reason=reason,
        trials=tuple(trials or ()),
    )
    _log.info(
        "%s %s runs on %s, %s: %s",
        *(manifest.name, manifest.version, candidate.title, runs_on.runtime, reason),
    )
    return backend, runs_on


def _runtime(provider: str) -> str:
    if provider == "openvino":
        return f"OpenVINO {openvino.version()}"
    return f"ONNX Runtime {onnxruntime.__version__}"


def _named(provider: str) -> str:
    return "any provider" if provider == "auto" else provider
