"""Starts a run from another one: `fit --from RUN` takes the weights of an earlier checkpoint."""

from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from train.errors import CheckpointError
from train.model.checkpoint import (
    WeightsOrigin,
    check_classes,
    read_card,
    read_checkpoint,
    weights_file,
)
from train.model.pretrained import resize_image_encoder, resize_pathology_positions
from train.model.segmenter import Segmenter
from train.model.weight_files import differing
from train.presets import PRESETS
from train.settings import LabelClass, ModelSettings, Settings

_ARCHITECTURE = (
    *("network", "image_encoder", "pathology_encoder"),
    *("pathology_args", "pathology_encoder_depth"),
    *("pathology_layer_scale", "pathology_mean", "pathology_std", "pathology_positions"),
    "decoder_dim",
)
"""Settings that describe the weights. A run that starts from another takes them from it."""
_BIAS = "class_attention_bias."


@dataclass(frozen=True)
class EarlierRun:
    """An earlier run to go on from."""

    settings: Settings
    """Those of the new run; see `settings_after`."""
    run: Path
    """The earlier run's folder or weights."""
    sha256: str
    """Of its weights."""

    def load_into(
        self, segmenter: Segmenter, classes: tuple[LabelClass, ...]
    ) -> tuple[WeightsOrigin, ...]:
        """Load its weights into a model of `settings`; see `load_run`. Tells what was left out.

        Raises:
            CheckpointError: it has other weights by now.
        """
        origins, left_out = load_run(segmenter, self.run, classes)
        if origins[0].sha256 != self.sha256:
            raise CheckpointError(
                f"{self.run} has other weights now than when this training began: it is trained "
                "on, or was replaced. Start again from a copy of it, or when it has ended."
            )
        for name in left_out:
            Console().print(f"not taken from {self.run}: {name}", markup=False, soft_wrap=True)
        return origins


def settings_after(settings: Settings, run: Path) -> Settings:
    """Give a new run the encoders and the decoder of an earlier one.

    Raises:
        CheckpointError: the earlier run has no checkpoint, or the new settings ask for another
            architecture.
    """
    earlier = read_card(run).settings.model
    if earlier.network != "sam_path":
        raise CheckpointError(
            f"{run} is a run of --network {earlier.network}; expected one of the paper's model. "
            "Train from the start, or continue that run with --resume."
        )
    preset = PRESETS[settings.preset]().model if settings.preset in PRESETS else ModelSettings()
    model = settings.model
    for name in _ARCHITECTURE:
        wanted, has = getattr(model, name), getattr(earlier, name)
        if wanted not in (has, getattr(preset, name)):
            raise CheckpointError(
                f"{run} has {name} {has}, and --{name.replace('_', '-')} is {wanted}. Leave the "
                "option out: a run that starts from another one has its architecture."
            )
        model = replace(model, **{name: has})
    return replace(settings, model=replace(model, mpp=model.mpp or earlier.mpp))


def load_run(
    segmenter: Segmenter, run: Path, classes: tuple[LabelClass, ...]
) -> tuple[tuple[WeightsOrigin, ...], list[str]]:
    """Load an earlier run's weights into a model of `settings_after`.

    Position embeddings are resized to the tile. A learned bias is taken where both models learn
    one of the same kind; otherwise the new one keeps its start.

    The model's bias must have its start already, and `classes` be in the order of their labels.

    Returns:
        Where the weights come from: the run, and what that started from. And the weights of the run
        that were not taken, each with the reason.

    Raises:
        CheckpointError: the run has other classes or shapes, or is damaged.
    """
    card, source = read_checkpoint(run)
    check_classes(card, str(run), classes)
    path = weights_file(run)
    resize_image_encoder(source, segmenter)
    resize_pathology_positions(
        source, segmenter, segmenter.pathology_encoder.positions or "timm", path
    )
    target = segmenter.state_dict()
    old_bias, new_bias = ({n for n in names if n.startswith(_BIAS)} for names in (source, target))
    learns = {n for n, parameter in segmenter.named_parameters() if parameter.requires_grad}
    left_out = []
    for name in sorted(old_bias):
        is_same_kind = old_bias == new_bias and source[name].shape == target[name].shape
        if not (is_same_kind and any(card.class_attention_bias) and name in learns):
            del source[name]
            left_out.append(f"{name}: the bias starts again, as the settings say")
    expected = {n: v for n, v in target.items() if n in source or n not in new_bias}
    if problems := differing(source, expected):
        raise CheckpointError(
            f"{path} does not fit the model, {len(problems)} weights differ: "
            f"{'; '.join(problems[:3])}. Train with the encoders and the decoder of that run."
        )
    segmenter.load_state_dict(source, strict=False)
    origin = WeightsOrigin(
        part="whole model",
        name=f"the run {path.resolve().parent.name}",
        file=path.name,
        sha256=card.weights_sha256,
        licence="the terms of what that run started from and of its data",
    )
    return (origin, *card.origins), left_out
