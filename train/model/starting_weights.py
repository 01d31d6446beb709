"""The published weights that a run starts from: what they say about the model, and their terms."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from train.errors import WeightsError
from train.model.checkpoint import WeightsOrigin
from train.model.encoder_folder import CONFIG_FILE, EncoderConfig, read_encoder_config
from train.model.encoder_kinds import ENCODER_KINDS, kind_of, with_kind_written_out
from train.model.pathology_encoder import timm_args
from train.model.pretrained import load_sam_weights, load_vit
from train.model.segmenter import Segmenter
from train.model.weight_files import (
    WHERE_TO_GET_WEIGHTS,
    read_weights,
    weights_file,
    weights_sha256,
)
from train.model.weight_names import VitFacts, VitWeights, as_timm, vit_facts
from train.presets import PRESETS
from train.settings import LabelClass, ModelSettings, Settings

_LAYER_SCALE = 1e-5
_UNKNOWN_LICENCE = "its authors' terms, which FocalPath does not know"


@dataclass(frozen=True)
class StartingWeights:
    """Published weights, read and described, to be loaded into the model of `settings`."""

    settings: Settings
    """The run's settings, with what the weights say about the pathology encoder."""
    origins: tuple[WeightsOrigin, ...]
    pathology: VitWeights | None

    def load_into(
        self, segmenter: Segmenter, classes: tuple[LabelClass, ...]
    ) -> tuple[WeightsOrigin, ...]:
        """Load them into a model of `settings`, of any classes; returns where they come from.

        Raises:
            WeightsError: they are not of its architecture.
        """
        weights = self.settings.weights
        if weights.sam_weights is not None:
            load_sam_weights(segmenter, Path(weights.sam_weights))
        if self.pathology is not None:
            assert weights.pathology_weights is not None
            load_vit(segmenter, self.pathology, weights_file(Path(weights.pathology_weights)))
        return self.origins


def starting_weights(settings: Settings) -> StartingWeights:
    """Read the weights that a run starts from, before it trains.

    A folder's config.json sets the architecture, mean and standard deviation. LayerScale, register
    tokens and SwiGLU are read off the weights. The settings that come back say all of it.

    Raises:
        WeightsError: frozen encoders have no weights, a file cannot be read, or it contradicts its
            config.json or the settings.
    """
    _check_given(settings)
    origins = [*_sam_origin(settings)]
    model, vit = with_kind_written_out(settings.model), None
    if settings.weights.pathology_weights is not None:
        path = Path(settings.weights.pathology_weights)
        file = weights_file(path)
        vit = as_timm(read_weights(file), file)
        config = read_encoder_config(path) if path.is_dir() else None
        if settings.model.pathology_encoder in ENCODER_KINDS:
            config = None  # its own entry says more
        if config is not None:
            model = _with_config(model, config, settings.preset, path)
        model = _with_facts(model, vit, file, "--pathology-args" if config is None else CONFIG_FILE)
        model = replace(model, pathology_positions=model.pathology_positions or vit.positions)
        origins.append(_pathology_origin(model, file, config))
    return StartingWeights(replace(settings, model=model), tuple(origins), vit)


def _check_given(settings: Settings) -> None:
    weights = settings.weights
    missing = [
        f"--{name.replace('_', '-')}"
        for name in ("sam_weights", "pathology_weights")
        if getattr(weights, name) is None
    ]
    if settings.model.encoders_frozen and missing and not weights.random_encoders:
        raise WeightsError(
            f"the encoders are frozen, and {' and '.join(missing)} is not given: random encoders "
            "see nothing. Give the published weights' files, or add --no-encoders-frozen. Where "
            f"they come from:\n{WHERE_TO_GET_WEIGHTS}"
        )


def _sam_origin(settings: Settings) -> list[WeightsOrigin]:
    if settings.weights.sam_weights is None:
        return []
    file = Path(settings.weights.sam_weights)
    return [
        WeightsOrigin(
            part="image encoder and decoder",
            name=f"SAM {settings.model.image_encoder}",
            file=file.name,
            sha256=weights_sha256(file),
            licence="Apache-2.0",
        )
    ]


def _pathology_origin(
    model: ModelSettings, file: Path, config: EncoderConfig | None
) -> WeightsOrigin:
    kind = kind_of(model, file.name)
    stated = config.licence if config is not None else None
    return WeightsOrigin(
        part="pathology encoder",
        name=model.pathology_encoder if kind is None else kind.title,
        file=file.name,
        sha256=weights_sha256(file),
        licence=(stated or _UNKNOWN_LICENCE) if kind is None else kind.licence,
    )


def _with_config(
    model: ModelSettings, config: EncoderConfig, preset: str, folder: Path
) -> ModelSettings:
    """Take architecture and preprocessing from a folder's config.json.

    Raises:
        WeightsError: the settings name another encoder.
    """
    preset_model = PRESETS[preset]().model if preset in PRESETS else ModelSettings()
    defaults = {ModelSettings().pathology_encoder, preset_model.pathology_encoder}
    if model.pathology_encoder not in {*defaults, config.architecture}:
        raise WeightsError(
            f"{folder / CONFIG_FILE} describes {config.architecture}, and --pathology-encoder is "
            f"{model.pathology_encoder}. Leave that option out, or give the file of weights itself."
        )
    depth = model.pathology_encoder_depth
    return replace(
        model,
        pathology_encoder=config.architecture,
        pathology_args={**config.args, **model.pathology_args},
        pathology_encoder_depth=None if depth == preset_model.pathology_encoder_depth else depth,
        pathology_mean=model.pathology_mean or config.mean,
        pathology_std=model.pathology_std or config.std,
    )


def _with_facts(model: ModelSettings, vit: VitWeights, file: Path, said_by: str) -> ModelSettings:
    """Complete the architecture from the weights, where settings and config.json leave it open.

    Raises:
        WeightsError: the settings or config.json contradict the weights.
    """
    facts = vit_facts(vit.tensors)
    if facts is None:
        return model
    args = timm_args(model)
    found: dict[str, Any] = {
        "patch_size": facts.patch_size,
        "embed_dim": facts.embed_dim,
        "depth": facts.depth,
        "reg_tokens": facts.num_registers,
    }
    wrong = [
        f"{name} {args[name]}, the weights {value}"
        for name, value in found.items()
        if args.get(name) is not None and args[name] != value
    ]
    if args.get("init_values") is not None and not facts.has_layer_scale:
        wrong.append(f"init_values {args['init_values']} (LayerScale), the weights have none")
    if "mlp_layer" in args and ("Glu" in args["mlp_layer"] or "GLU" in args["mlp_layer"]) != (
        facts.has_swiglu
    ):
        gated = "a gated" if facts.has_swiglu else "no gated"
        wrong.append(f"mlp_layer {args['mlp_layer']}, the weights have {gated} MLP")
    if wrong:
        raise WeightsError(
            f"{file} contradicts {said_by} or the encoder {model.pathology_encoder}: it says "
            f"{'; '.join(wrong)}. Take the config.json and the weights of the same encoder."
        )
    return replace(
        model, pathology_args={**_missing_args(args, facts, vit), **model.pathology_args}
    )


def _missing_args(
    args: dict[str, Any], facts: VitFacts, vit: VitWeights
) -> dict[str, bool | int | float | str]:
    """Arguments of timm's that the weights need and that are not given yet."""
    needed: dict[str, bool | int | float | str] = {}
    if facts.has_layer_scale:
        needed["init_values"] = _LAYER_SCALE
    if facts.num_registers:
        needed["reg_tokens"] = facts.num_registers
    positions, has_class_token = vit.tensors.get("pos_embed"), "cls_token" in vit.tensors
    if positions is not None and positions.ndim > 1 and has_class_token:
        is_square = round(positions.shape[1] ** 0.5) ** 2 == positions.shape[1]
        if is_square or facts.num_registers:
            needed["no_embed_class"] = is_square
    if facts.has_swiglu:
        needed |= {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}
    if facts.mlp_width != 4 * facts.embed_dim:
        # timm rounds the product down.
        needed["mlp_ratio"] = (facts.mlp_width + 0.5) / facts.embed_dim
    return {name: value for name, value in needed.items() if name not in args}
