"""The presets: the settings of a training run on each kind of data."""

from collections.abc import Callable
from dataclasses import replace

from train.settings import (
    AugmentationSettings,
    BiasSettings,
    LossSettings,
    ModelSettings,
    OptimizationSettings,
    Settings,
)

CRAG_MPP = 0.55
"""um per pixel of CRAG's images (our choice: the files do not state it)."""


def synthetic() -> Settings:
    """Small encoders, trained from scratch on synthetic tissue in minutes on a CPU (our choice).

    The image encoder, a convolutional stem with skip connections, the learning rate and the
    augmentation were chosen on validation tiles (see docs/training.md).
    """
    return Settings(
        preset="synthetic",
        model=ModelSettings(
            tile_size_px=256,
            image_encoder="tiny_pyramid",
            pathology_encoder="vit_tiny_patch16_224",
            pathology_encoder_depth=1,
            encoders_frozen=False,
            decoder_dim=128,
        ),
        bias=BiasSettings(bias_lr_factor=10.0),
        loss=LossSettings(dice_per_image=False),
        optimization=OptimizationSettings(
            epochs=13, batch_size=4, learning_rate=2e-3, warmup_steps=60
        ),
        augmentation=AugmentationSettings(augment="dihedral", num_workers=0),
    )


def small() -> Settings:
    """A few images of your own: small encoders trained from scratch, with strong augmentation.

    The image encoder and the learning rate were chosen on validation images of GlaS (see
    docs/training.md).
    """
    settings = synthetic()
    return replace(
        settings,
        preset="small",
        optimization=replace(settings.optimization, epochs=60, learning_rate=1e-3, warmup_steps=20),
        augmentation=replace(
            settings.augmentation, augment="full", crop_scale_min=0.5, stain_jitter=0.05
        ),
    )


def glas() -> Settings:
    """Glands of the colon (GlaS): the small preset at 1.55 um per pixel, minutes on a CPU.

    Tiles of 192 pixels and 8 epochs (our choice): for comparisons that one core can repeat, and far
    from the best model that these images allow. The encoder, its norms and its learning rate were
    chosen on validation images (docs/training.md), none on test images. bfloat16 takes two thirds
    of the time where the processor computes in it.
    """
    settings = small()
    return replace(
        settings,
        preset="glas",
        model=replace(settings.model, tile_size_px=192, mpp=1.55),
        optimization=replace(settings.optimization, epochs=8, precision="bf16-mixed"),
    )


def ocelot() -> Settings:
    """Cancer area in six organs (OCELOT): the glas preset at 3.1 um per pixel.

    An image of 1024 pixels is then one tile of 256 (our choice, nothing was tuned on OCELOT).
    """
    settings = glas()
    return replace(
        settings,
        preset="ocelot",
        model=replace(settings.model, tile_size_px=256, mpp=3.112),
    )


def bcss() -> Settings:
    """Breast cancer, five classes, 1024 x 1024 tiles at 0.25 um per pixel."""
    return Settings(preset="bcss", optimization=OptimizationSettings(accumulate_batches=2))


def bdsa() -> Settings:
    """Brain tissue, five classes; values as for BCSS (our choice)."""
    return Settings(preset="bdsa", optimization=OptimizationSettings(accumulate_batches=2))


def crag() -> Settings:
    """Colorectal glands, two classes, 1536 x 1536 images that the model sees at 1024 x 1024.

    So the model's um per pixel is 1.5 times that of the images, which `prepare crag` takes to be
    0.55. Scores count the images' own pixels, as the paper's do.
    """
    return Settings(
        preset="crag",
        model=ModelSettings(mpp=round(CRAG_MPP * 1536 / 1024, 6)),
        loss=LossSettings(focal_weight=0.125, iou_weight=0.0),
        optimization=OptimizationSettings(epochs=60, batch_size=6, warmup_steps=46),
    )


PRESETS: dict[str, Callable[[], Settings]] = {
    "synthetic": synthetic,
    "small": small,
    "glas": glas,
    "ocelot": ocelot,
    "bcss": bcss,
    "bdsa": bdsa,
    "crag": crag,
}
