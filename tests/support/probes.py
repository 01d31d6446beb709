"""What the clients of a load ask, with the right answers of the toy bundle's model."""

import numpy as np

from serve.client.load import Probe
from tests.support.pictures import encoded, painted
from tests.support.toy_bundle import TILE_SIZE_PX


def probe_of(label: int, size_px: int = TILE_SIZE_PX) -> Probe:
    """A square image of one class."""
    labels = np.full((size_px, size_px), label, np.uint8)
    return Probe(encoded(painted(labels)), labels)
