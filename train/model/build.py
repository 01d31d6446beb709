"""Builds the network that the settings name."""

from train.model.segmenter import Segmenter
from train.model.unet import UNetSegmenter
from train.settings import ModelSettings, NetworkName

NETWORKS: dict[NetworkName, type[Segmenter]] = {"sam_path": Segmenter, "unet": UNetSegmenter}


def build_segmenter(settings: ModelSettings, num_classes: int) -> Segmenter:
    """Build the network with random weights and a bias of zero.

    Raises:
        SettingsError: the network does not fit the other settings, or its library is missing.
        EncoderError: an encoder does not fit.
    """
    return NETWORKS[settings.network](settings, num_classes)
