"""What a run starts from: published weights, or an earlier run."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from train.errors import SettingsError
from train.model.checkpoint import MAX_WEIGHTS_BYTES, WeightsOrigin
from train.model.previous_run import load_run, settings_after
from train.model.segmenter import Segmenter
from train.model.starting_weights import StartingWeights, starting_weights
from train.settings import LabelClass, Settings


@dataclass(frozen=True)
class Start:
    """What a run starts from, and the settings completed by it."""

    settings: Settings
    published: StartingWeights | None
    """None where the run starts from an earlier run."""

    def load(
        self, segmenter: Segmenter, classes: tuple[LabelClass, ...]
    ) -> tuple[WeightsOrigin, ...]:
        """Load the weights into a model of `settings`; returns where they come from.

        Raises:
            SettingsError: the model cannot be exported, and `exportable` is set.
            WeightsError: published weights are not of its architecture.
            CheckpointError: the earlier run has other classes or shapes, or is damaged.
        """
        if self.settings.runtime.exportable:
            _check_exportable(segmenter, self.settings)
        if self.published is not None:
            self.published.load_into(segmenter)
            return self.published.origins
        assert self.settings.weights.from_run is not None
        origins, left_out = load_run(segmenter, Path(self.settings.weights.from_run), classes)
        for name in left_out:
            text = f"not taken from {self.settings.weights.from_run}: {name}"
            Console().print(text, markup=False, soft_wrap=True)
        return origins


def find_start(settings: Settings) -> Start:
    """Find what a run starts from, before it trains.

    Raises:
        SettingsError: both an earlier run and published weights are given.
        WeightsError: published weights are missing, or cannot be read.
        CheckpointError: the earlier run has no checkpoint, or another architecture than asked for.
    """
    weights = settings.weights
    if weights.from_run is None:
        published = starting_weights(settings)
        return Start(published.settings, published)
    if weights.sam_weights is not None or weights.pathology_weights is not None:
        raise SettingsError(
            f"--from {weights.from_run} is given together with published weights, which its own "
            "would replace. Leave out --sam-weights and --pathology-weights."
        )
    return Start(settings_after(settings, Path(weights.from_run)), None)


def _check_exportable(segmenter: Segmenter, settings: Settings) -> None:
    """Refuse a U-Net, and a model that is too large for one ONNX file, before it trains."""
    if settings.model.network != "sam_path":
        raise SettingsError(
            f"--network {settings.model.network} is only there to compare with, and is not "
            "exported. Add --no-exportable to train it for `evaluate` and `predict`."
        )
    num_bytes = sum(value.numel() * 4 for value in segmenter.state_dict().values())
    if num_bytes > MAX_WEIGHTS_BYTES:
        raise SettingsError(
            f"the model has {num_bytes / 4e6:.0f} million parameters with the encoders "
            f"{settings.model.image_encoder} and {settings.model.pathology_encoder}; at most "
            f"{MAX_WEIGHTS_BYTES / 4e6:.0f} million can be exported, since an ONNX file holds "
            "2 GiB. Choose smaller encoders, or add --no-exportable to train it for `evaluate` "
            "and `predict` alone."
        )
