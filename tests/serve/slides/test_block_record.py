import numpy as np

from serve.slides.block_record import count_cells


def test_cells_are_counted_per_label_with_their_confidence() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice(np.array([0, 1, 4, 5], np.uint8), (300, 37))
    confidence = rng.integers(0, 256, labels.shape).astype(np.uint8)
    confidence[:2] = [[127], [128]]  # 128 is the first that is not low
    found = count_cells(labels, confidence)
    of = [confidence[labels == label].astype(int) for label in range(6)]
    assert found.cells == tuple(len(some) for some in of)
    assert found.confidence_sums == tuple(some.sum() for some in of)
    assert found.low_confidence_cells == tuple((some < 127.5).sum() for some in of)
