"""A plain U-Net, as a baseline. It trains, scores and predicts as the paper's model does."""

from typing import Self

from torch import Tensor, nn

from serve.contract.extras import how_to_install
from train.errors import SettingsError
from train.model.class_bias import ClassTerms, find_strategy
from train.model.segmenter import Segmenter, SegmenterOutput
from train.settings import ModelSettings

_CHANNELS = (16, 32, 64, 128, 256)
_STRIDES = (2, 2, 2, 2)
_NUM_RESIDUAL_UNITS = 2
"""MONAI's own tutorial size (1.6 million parameters), with its default norm and activation."""


class UNetSegmenter(Segmenter):
    """MONAI's residual U-Net in place of encoders, neck and decoder.

    Its masks have the tile's full resolution. It has neither a class bias nor an IoU head, so the
    predicted IoU is 0 and the export refuses it.
    """

    def __init__(self, settings: ModelSettings, num_classes: int) -> None:
        """Build the network with random weights.

        Raises:
            SettingsError: MONAI is not installed, or the settings ask for a bias or for frozen
                encoders.
        """
        nn.Module.__init__(self)
        _check(settings)
        self.tile_size_px = settings.tile_size_px
        self.encoders_frozen = False
        self.num_classes = num_classes
        self.num_features = 3
        self.unet = _monai_unet(1 + num_classes)
        strategy = find_strategy(settings.bias)
        self.class_attention_bias = strategy.module(num_classes).requires_grad_(False)
        self.normalise_as_sam()
        self.train()

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        """The whole network."""
        return (self.unet,)

    @property
    def image_to_token_attentions(self) -> tuple[nn.Module, ...]:
        """A U-Net has none."""
        return ()

    def freeze_iou_head(self) -> None:
        """Do nothing: a U-Net has no IoU head."""

    def encode(self, images: Tensor) -> Tensor:
        """The normalised image, (B, 3, H, W)."""
        return (images - self.pixel_mean) / self.pixel_std

    def decode(self, features: Tensor, terms: ClassTerms | None = None) -> SegmenterOutput:
        """Masks (B, 1 + C, H, W) of the normalised image; `terms` are ignored."""
        logits: Tensor = self.unet(features)
        return SegmenterOutput(logits, logits.new_zeros(logits.shape[:2]))

    def train(self, mode: bool = True) -> Self:
        """Set training mode."""
        nn.Module.train(self, mode)
        return self


def _check(settings: ModelSettings) -> None:
    if settings.bias != "none":
        raise SettingsError(
            f"--network unet is given with --bias {settings.bias}; a U-Net has no attention to "
            "bias. Add --bias none."
        )
    if settings.encoders_frozen:
        raise SettingsError(
            "--network unet is given, and encoders_frozen is set; a U-Net has no encoder that "
            "could be frozen. Add --no-encoders-frozen."
        )


def _monai_unet(num_channels: int) -> nn.Module:
    try:
        from monai.networks.nets.unet import UNet
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"--network unet needs MONAI, and {error.name} is not installed: "
            f"{how_to_install('compare')}."
        ) from error
    unet: nn.Module = UNet(
        spatial_dims=2,
        in_channels=3,
        out_channels=num_channels,
        channels=_CHANNELS,
        strides=_STRIDES,
        num_res_units=_NUM_RESIDUAL_UNITS,
    )
    return unet
