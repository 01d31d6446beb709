"""Starts a run from another one: `fit --from RUN` takes the weights of an earlier checkpoint."""

from dataclasses import dataclass, replace
from pathlib import Path

from train.errors import CheckpointError
from train.model.checkpoint import (
    CheckpointCard,
    WeightsOrigin,
    read_card,
    read_checkpoint_weights,
    weights_file,
)
from train.model.pretrained import resize_image_encoder, resize_position_embedding
from train.model.segmenter import Segmenter
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
_VIT = "pathology_encoder.vit."


@dataclass(frozen=True)
class LoadedRun:
    """What was taken from an earlier run."""

    origins: tuple[WeightsOrigin, ...]
    """Where the weights come from: the run, and what that started from."""
    left_out: tuple[str, ...]
    """Weights of the earlier run that were not taken, each with the reason."""


def settings_after(settings: Settings, run: Path) -> Settings:
    """Give a new run the encoders and the decoder of an earlier one.

    Args:
        settings: Those of the new run.
        run: The earlier run's folder or weights.

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


def load_run(segmenter: Segmenter, run: Path, classes: tuple[LabelClass, ...]) -> LoadedRun:
    """Load an earlier run's weights into a model of `settings_after`.

    Position embeddings are resized to the tile. A learned bias is taken where both models learn
    one of the same kind; otherwise the new one keeps its start.

    Args:
        segmenter: The model; its bias has its start already.
        run: The earlier run's folder or weights.
        classes: The new run's classes, in the order of their labels.

    Raises:
        CheckpointError: the run has other classes or shapes, or is damaged.
    """
    card = read_card(run)
    _check_classes(card, run, classes)
    path = weights_file(run)
    source = read_checkpoint_weights(run, card)
    resize_image_encoder(source, segmenter)
    vit = {k.removeprefix(_VIT): v for k, v in source.items() if k.startswith(_VIT)}
    positions = segmenter.pathology_encoder.positions or "timm"
    resize_position_embedding(vit, segmenter.pathology_encoder.vit, positions, path)
    source |= {_VIT + name: value for name, value in vit.items()}
    target = segmenter.state_dict()
    fitting = {n: v for n, v in source.items() if n in target and v.shape == target[n].shape}
    learns = {n for n, parameter in segmenter.named_parameters() if parameter.requires_grad}
    same_bias = {n for n in source if n.startswith(_BIAS)} == {
        n for n in target if n.startswith(_BIAS)
    }
    was_learned = card.class_attention_bias and any(card.class_attention_bias)
    left_out = []
    for name in [name for name in source if name.startswith(_BIAS)]:
        if not (same_bias and was_learned and name in learns and name in fitting):
            fitting.pop(name, None)
            left_out.append(f"{name}: the bias starts again, as the settings say")
    problems = [
        f"{name} is {tuple(source[name].shape) if name in source else 'missing'}, expected "
        f"{tuple(target[name].shape) if name in target else 'no such weight'}"
        for name in sorted(source.keys() | target.keys())
        if name not in fitting and not name.startswith(_BIAS)
    ]
    if problems:
        raise CheckpointError(
            f"{path} does not fit the model, {len(problems)} weights differ: "
            f"{'; '.join(problems[:3])}. Train with the encoders and the decoder of that run."
        )
    segmenter.load_state_dict(fitting, strict=False)
    origin = WeightsOrigin(
        part="whole model",
        name=f"the run {path.resolve().parent.name}",
        file=path.name,
        sha256=card.weights_sha256,
        licence="the terms of what that run started from and of its data",
    )
    return LoadedRun((origin, *card.origins), tuple(left_out))


def _check_classes(card: CheckpointCard, run: Path, classes: tuple[LabelClass, ...]) -> None:
    found = [entry.name for entry in card.classes]
    wanted = [entry.name for entry in classes]
    if found != wanted:
        raise CheckpointError(
            f"{run} has the classes {', '.join(found)}; the data set has {', '.join(wanted)}. "
            "Expected the same names in the same order: each class has its own token."
        )
