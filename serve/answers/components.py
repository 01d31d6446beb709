"""The connected regions of a label image, found without tracing any outline.

Works on runs: stretches of one label within a row. An image has far fewer runs than pixels, and
its regions are the runs of one label that share sides of pixels.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve.contract.errors import ImageTooLargeError

NOTHING = 255
"""The label of pixels that are left out. A model has at most 254 classes."""
MAX_RUNS = 8_000_000
"""Most runs that are looked at: bounds the memory to about 1 GB."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Components:
    """The connected regions of a label image; each is named by the index of one of its runs."""

    shape: tuple[int, int]
    starts: Ints
    """Flat index of the first pixel of each run, ascending."""
    lengths: Ints
    """Pixels of each run."""
    labels: NDArray[np.uint8]
    """Of each run."""
    touching: tuple[Ints, Ints]
    """Pairs of runs that share a side: of rows above each other, or of the same row."""
    component: Ints
    """The region of each run."""

    @classmethod
    def of(cls, labels: NDArray[np.uint8]) -> "Components":
        """Find the regions of an (H, W) label image; they connect through sides of pixels.

        Raises:
            ImageTooLargeError: the labels change too often to be of use.
        """
        changes = np.ones(labels.shape, bool)
        changes[:, 1:] = labels[:, 1:] != labels[:, :-1]
        starts = np.flatnonzero(changes)
        if len(starts) > MAX_RUNS:
            raise ImageTooLargeError(
                f"The labels change {len(starts)} times along the rows, at most {MAX_RUNS} changes "
                "can be outlined. Ask for /labels, or send a smaller image."
            )
        values = labels.ravel()[starts]
        touching = _touching(starts, *labels.shape)
        return cls(
            shape=(labels.shape[0], labels.shape[1]),
            starts=starts,
            lengths=np.diff(starts, append=labels.size),
            labels=values,
            touching=touching,
            component=_connect_alike(values, touching),
        )

    def area_px(self) -> Ints:
        """Pixels of each region, by its name."""
        return np.bincount(self.component, self.lengths, len(self.starts)).astype(np.int64)

    def sums(self, values: NDArray[np.uint8]) -> Ints:
        """Sum of an (H, W) image over each region, by its name."""
        by_run = np.add.reduceat(values.ravel(), self.starts, dtype=np.int64)
        return np.bincount(self.component, by_run, len(self.starts)).astype(np.int64)

    def run_at(self, row: Ints, column: Ints) -> Ints:
        """The runs of pixels."""
        flat = row * self.shape[1] + column
        return np.searchsorted(self.starts, flat, side="right") - 1

    def connected(self, labels: NDArray[np.uint8]) -> Ints:
        """The region of each run where the runs have other labels."""
        return self.component if labels is self.labels else _connect_alike(labels, self.touching)

    def without_small(self, min_area_px: int, *, is_part: bool = False) -> NDArray[np.uint8]:
        """The labels of the runs, small regions left out.

        Regions of fewer pixels become `NOTHING`; what they leave inside of one other region takes
        that one's label, if it has fewer pixels itself.

        Args:
            min_area_px: pixels of the smallest region that stays.
            is_part: the image is a part of a larger one: what touches its frame may go on beyond,
                and stays.
        """
        is_small = self.area_px() < min_area_px
        if is_part:
            is_small[self.component[self._is_at_frame()]] = False
        is_small = is_small[self.component]
        labels = np.where(is_small, np.uint8(NOTHING), self.labels)
        one, other = self.touching
        inside = is_small[one] & is_small[other]
        gap = connect(len(self.starts), one[inside], other[inside])
        lowest, highest = self._around(gap, is_small)
        gap_area = np.bincount(gap, self.lengths, len(gap))
        is_enclosed = (lowest == highest) & (gap_area < min_area_px)
        is_enclosed[gap[is_small & self._is_at_frame()]] = False
        filled = is_small & is_enclosed[gap]
        labels[filled] = self.labels[lowest[gap[filled]]]
        return labels

    def paint(self, labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The (H, W) image of labels of the runs."""
        return np.repeat(labels, self.lengths).reshape(self.shape)

    def _around(self, gap: Ints, is_small: NDArray[np.bool_]) -> tuple[Ints, Ints]:
        """The lowest and the highest name of the regions that stay around each gap."""
        one, other = self.touching
        mixed = is_small[one] != is_small[other]
        one, other = one[mixed], other[mixed]
        small, stays = np.where(is_small[one], (one, other), (other, one))
        lowest, highest = np.full(len(gap), len(gap)), np.full(len(gap), -1)
        np.minimum.at(lowest, gap[small], self.component[stays])
        np.maximum.at(highest, gap[small], self.component[stays])
        return lowest, highest

    def _is_at_frame(self) -> NDArray[np.bool_]:
        """Which runs touch the image's frame."""
        height, width = self.shape
        row, column = np.divmod(self.starts, width)
        beside = (column == 0) | (column + self.lengths == width)
        at_frame: NDArray[np.bool_] = (row == 0) | (row == height - 1) | beside
        return at_frame


def _touching(starts: Ints, height: int, width: int) -> tuple[Ints, Ints]:
    """Pairs of runs that share a side.

    Two runs of rows above each other overlap where one of them begins above or below the other.
    """
    index = np.arange(len(starts))
    has_above, has_below = starts >= width, starts < (height - 1) * width
    above = np.searchsorted(starts, starts[has_above] - width, side="right") - 1
    below = np.searchsorted(starts, starts[has_below] + width, side="right") - 1
    beside = index[1:][starts[1:] % width > 0]
    return (
        np.concatenate([above, index[has_below], beside - 1]),
        np.concatenate([index[has_above], below, beside]),
    )


def _connect_alike(labels: NDArray[np.uint8], touching: tuple[Ints, Ints]) -> Ints:
    """The region of each run: runs of one label that share sides."""
    one, other = touching
    same = np.flatnonzero(labels[one] == labels[other])
    return connect(len(labels), one[same], other[same])


def connect(count: int, one: Ints, other: Ints) -> Ints:
    """The lowest member of each node's connected component, given the edges between nodes."""
    root = np.arange(count)
    while len(one):
        low, high = np.minimum(one, other), np.maximum(one, other)
        np.minimum.at(root, high, low)
        while not np.array_equal(further := root[root], root):
            root = further
        one, other = root[one], root[other]
        apart = one != other
        one, other = one[apart], other[apart]
    return root
