"""The settings of a training run. `train.presets` has values for each kind of data.

Field names are unique over all the groups, so the command line shows them flat: `--bias dfa`.
Where neither the paper (arXiv 2604.13479) nor SAM-Path (arXiv 2307.09570) gives a value, the
field's text says "our choice".
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro
from pydantic import Field
from pydantic_core.core_schema import CoreSchema, no_info_after_validator_function, str_schema

from train.checked import (
    CheckedSettings,
    Count,
    Deviation,
    HalfAtMost,
    Mpp,
    NotNegative,
    NumberOf,
    Positive,
    Seed,
    Share,
    Sixteens,
)
from train.errors import SettingsError

MAX_CLASSES = 254
"""Labels are uint8: 0 is unlabelled, and one value is kept free."""


NetworkName = Literal["sam_path", "unet"]
"""An entry of `train.model.build.NETWORKS`."""


ImageEncoderName = Literal["tiny", "tiny_conv", "tiny_pyramid", "vit_b", "vit_l", "vit_h"]
"""An entry of `train.model.image_encoder.IMAGE_ENCODERS`."""


class BiasName(str):
    """The name of an entry of `train.model.class_bias.STRATEGIES`."""

    @classmethod
    def __get_pydantic_core_schema__(cls, *_: Any) -> CoreSchema:
        return no_info_after_validator_function(cls, str_schema())


@dataclass(frozen=True, kw_only=True)
class BiasSettings(CheckedSettings):
    """How the class bias starts and learns."""

    bias_init: Literal["warm", "cold"] = "warm"
    """Where a learned bias starts: at the centred log-frequency prior (Eq. 6), or at zero."""
    bias_frozen: bool = False
    """Keep a learned bias at its start: the control that tells learning from the prior."""
    bias_gamma: NotNegative = 0.5
    """Magnitude of the prior, the same for all strategies (our choice)."""
    bias_epsilon: Annotated[float, Field(gt=0, le=1)] = 1e-6
    """Added to frequencies and difficulties before the logarithm (our choice)."""
    bias_lr_factor: NotNegative = 100.0
    """The bias learns at this multiple of the base learning rate. The synthetic preset's 10 is our
    choice."""
    bias_regularisation: Literal["decay", "l2", "off"] = "decay"
    """The paper regularises delta "to prevent unbounded growth", and its factor is lost. decay:
    each step pulls the bias towards its prior, apart from the loss (our choice); l2: the paper's
    term, bias_l2 * sum(delta^2), in the loss. Adam ignores the size of a gradient, so that l2
    erases the prior within a few epochs."""
    bias_decay: NotNegative = 0.2
    """Strength of decay: it keeps a bias within about 1 / bias_decay of its prior (our choice)."""
    bias_l2: NotNegative = 1e-4
    """Factor of the l2 term (our choice)."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings(CheckedSettings):
    """The model: SAM-Path's encoders and decoder in any size, and the kind of class bias."""

    network: NetworkName = "sam_path"
    """sam_path: the paper's model. unet: a plain U-Net, to compare with. It has no class bias; it
    trains and predicts, but is not exported."""
    bias: BiasName = BiasName("dfa")
    """How attention is biased by class."""
    tile_size_px: Sixteens = 1024
    """Side of the square image that the model takes; a multiple of 16."""
    mpp: Mpp | None = None
    """um per pixel at which the model sees tissue: images of another are resampled to it. None
    takes the data set's."""
    squeeze: Annotated[bool, tyro.conf.Suppress] = False
    """Resize every image to one tile, whatever its size. Checkpoints of version 0.1 and earlier
    did so; new ones never do."""
    resized_from_px: Annotated[Sixteens | None, tyro.conf.Suppress] = None
    """Side of the square that the model itself resizes to `tile_size_px`: bilinear, in float,
    without antialiasing, with labels from the logits resized back. So SAM-Path shows a model images
    that are larger than its tile; models that are imported from it have this, everywhere that they
    run, so that their labels are SAM-Path's. None: the model takes a tile as it is."""
    image_encoder: ImageEncoderName = "vit_b"
    """Size of SAM's image encoder. The tiny ones are ours, to train from scratch. tiny_conv embeds
    patches with convolutions, which learns more from few images; tiny_pyramid also hands the
    convolutions' finer maps to the decoder, as a U-Net does."""
    pathology_encoder: str = "vit_small_patch16_224"
    """A published encoder by its short name (hipt, uni, uni2-h, virchow2, h-optimus-0, gigapath,
    phikon, hibou-b, midnight, ...: see docs/encoders.md), or any timm vision transformer with
    patches of 14 or 16 pixels, with or without a tag (vit_small_patch16_224.dino)."""
    pathology_args: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Arguments of the timm model that differ from its own, such as `reg_tokens 4 mlp_layer
    SwiGLUPacked`. A short name or the config.json of a weights folder sets them."""
    pathology_encoder_depth: Count | None = None
    """Number of its blocks; None keeps the architecture's own."""
    pathology_layer_scale: bool = False
    """The encoder has LayerScale, as UNI and other DINOv2 encoders have."""
    pathology_mean: tuple[Share, Share, Share] | None = None
    """Mean of the RGB inputs that the encoder was trained on, in [0, 1]; None takes timm's for its
    name (0.5 for vit_small_patch16_224, as HIPT)."""
    pathology_std: tuple[Deviation, Deviation, Deviation] | None = None
    """Standard deviation of the RGB inputs that the encoder was trained on, in [0, 1]."""
    pathology_positions: Literal["timm", "dino"] | None = None
    """How position embeddings of another grid are resized. timm: bicubic with antialiasing; dino:
    bicubic without, at a scale of (new side + 0.1) / old side, as DINO, HIPT and SAM-Path do. None
    chooses by the kind of weights: dino for DINO's and HIPT's files, timm for the others."""
    encoders_frozen: bool = True
    """Train only the fusion neck and the decoder, as SAM-Path does."""
    decoder_dim: Sixteens = 256
    """Channels of the mask decoder (SAM: 256); a multiple of 16, as its attention has 8 heads at
    half of them."""

    @property
    def input_px(self) -> int:
        """Side of the square that the model is given."""
        return self.resized_from_px or self.tile_size_px


@dataclass(frozen=True, kw_only=True)
class LossSettings(CheckedSettings):
    """Eq. 7: (1 - focal_weight) Dice + focal_weight Focal + iou_weight MSE."""

    dice_per_image: bool = True
    """Average the Dice of each image, as SAM-Path does. Otherwise pool the pixels of a batch, so
    that a class that is absent from an image costs nothing."""
    focal: bool = True
    """Use the focal loss; without it the Dice loss has all the weight."""
    class_weights: Literal["none", "sqrt", "inverse"] = "none"
    """Weight of each class in Dice and focal loss. none: the same, as in the paper; inverse: by
    one over its share of the labelled training pixels; sqrt: by the root of that. Their mean is 1
    (our choice)."""
    focal_weight: Share = 0.25
    """Lambda: the focal loss's share."""
    focal_gamma: NotNegative = 2.0
    """Focusing parameter of the focal loss."""
    iou_weight: NotNegative = 0.0625
    """Beta: weight of the squared error of the predicted IoU."""


@dataclass(frozen=True, kw_only=True)
class OptimizationSettings(CheckedSettings):
    """AdamW with cosine annealing after a linear warm-up."""

    epochs: Count = 32
    """Passes over the training tiles."""
    batch_size: Count = 12
    """Tiles per step on each device."""
    accumulate_batches: Count = 1
    """Batches per optimiser step, which takes the mean of their gradients."""
    sampling: Literal["uniform", "balanced"] = "uniform"
    """uniform: every training tile once per epoch; balanced: as many tiles, drawn with replacement
    so that each class is as likely to be looked for, in images by their share of its area; a tile
    that is drawn again is augmented anew (our choice)."""
    learning_rate: Positive = 1e-4
    """Base learning rate."""
    weight_decay: NotNegative = 1e-2
    """AdamW's weight decay; the bias has none."""
    warmup_steps: NumberOf = 72
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: cosine annealing to zero, or the same learning rate to the end."""
    keep_epoch: Literal["best", "last"] = "best"
    """Which epoch's weights the run keeps: that of the best mean validation Dice, or the last."""
    gradient_clip: NotNegative = 1.0
    """Largest gradient norm (our choice)."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Lightning's precision of the arithmetic."""
    seed: Seed = 0
    """Seed of weights, order and augmentation."""


@dataclass(frozen=True, kw_only=True)
class AugmentationSettings(CheckedSettings):
    """How training tiles are varied."""

    augment: Literal["full", "dihedral", "none"] = "full"
    """full: crops that zoom in, flips, quarter turns and colour; dihedral: flips and quarter turns
    of crops of the tile's size; none: tiles at fixed places that cover each image."""
    crop_scale_min: Annotated[float, Field(gt=0, le=1)] = 0.08
    """Smallest share of the tile's area that a random crop keeps; it is enlarged to the tile."""
    color_jitter: HalfAtMost = 0.1
    """Strength of the change of brightness, contrast, saturation and hue, at most 0.5."""
    stain_jitter: HalfAtMost = 0.0
    """Strength of the change of haematoxylin, eosin and residual (HED jitter) under --augment full;
    0.05 is usual, at most 0.5. 0, as in the paper, leaves the stains alone."""
    num_workers: NumberOf = 4
    """Processes that load tiles; 0 loads them in the training process."""


@dataclass(frozen=True, kw_only=True)
class WeightsSettings(CheckedSettings):
    """Published weights to start from."""

    from_run: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Run to go on from: its weights, and its learned bias where the new run learns one of the same
    kind. Its architecture replaces the preset's."""
    sam_weights: str | None = None
    """SAM's .pth file."""
    pathology_weights: str | None = None
    """The pathology encoder's file, or a folder that has it beside a config.json, which then sets
    architecture, mean and standard deviation: timm's, DINO's, DINOv2's or transformers'."""
    random_encoders: bool = False
    """Allow frozen encoders without weights. Only for benchmarks: such encoders see nothing."""


@dataclass(frozen=True, kw_only=True)
class RuntimeSettings(CheckedSettings):
    """Where training runs and what it logs; nothing here changes the method."""

    devices: Count = 1
    """GPUs, or processes on the CPU, of each node."""
    nodes: Count = 1
    """Machines."""
    compile: bool = False
    """Compile the model with torch.compile."""
    embedding_cache: str | None = None
    """Folder for the frozen encoders' features, so that later epochs skip the encoders. Needs
    --augment dihedral or none."""
    embedding_dtype: Literal["float16", "bfloat16"] = "float16"
    """Type of the features in the cache."""
    patience: NumberOf | None = None
    """Stop after this many epochs without a better mean Dice; None trains all epochs."""
    exportable: bool = True
    """Refuse, before training, a model that could not be exported: a U-Net, or one that is too
    large for an ONNX file. --no-exportable trains it for `evaluate` and `predict` alone."""
    track: Literal["csv", "tensorboard", "mlflow"] = "csv"
    """Where to log besides metrics.csv; install tensorboard or mlflow yourself."""


@dataclass(frozen=True, kw_only=True)
class LabelClass:
    """A class of a data set's labels: its name and its colour, "#rrggbb"."""

    name: str
    color: str


def is_name(text: object) -> bool:
    """Whether something can be a class's name in tables, pictures and files: one line of text."""
    return isinstance(text, str) and text.isprintable() and text == text.strip() != ""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All of a run's settings."""

    preset: Annotated[str, tyro.conf.Suppress]
    model: ModelSettings = field(default_factory=ModelSettings)
    bias: BiasSettings = field(default_factory=BiasSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    optimization: OptimizationSettings = field(default_factory=OptimizationSettings)
    augmentation: AugmentationSettings = field(default_factory=AugmentationSettings)
    weights: WeightsSettings = field(default_factory=WeightsSettings)
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)

    @property
    def mixed_precision(self) -> bool:
        """Whether part of the arithmetic is in 16 bits."""
        return self.optimization.precision != "32-true"

    def __post_init__(self) -> None:
        """Refuse an embedding cache of features that change from epoch to epoch."""
        if self.runtime.embedding_cache is None:
            return
        if self.augmentation.augment == "full" or not self.model.encoders_frozen:
            raise SettingsError(
                f"--embedding-cache with --augment {self.augmentation.augment} and encoders "
                f"{'frozen' if self.model.encoders_frozen else 'trained'}; features can be kept "
                "only of frozen encoders and --augment dihedral or none"
            )


def upgrade_settings(stored: Any) -> Any:
    """Bring settings that an earlier version stored as JSON to the fields of this one."""
    if not isinstance(stored, dict):
        return stored
    model, bias = dict(stored.get("model", {})), dict(stored.get("bias", {}))
    if "bias" in bias:
        model["bias"] = bias.pop("bias")
    if "bias_l2" in bias:
        bias.setdefault("bias_regularisation", "l2")  # the only one, once
    if model.pop("resize", "antialiased") == "plain":  # an import of CRAG, of images of 1.5 tiles
        model.setdefault("resized_from_px", model["tile_size_px"] * 3 // 2)
    return {**stored, "model": model, "bias": bias}
