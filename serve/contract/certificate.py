"""The scale certificate: how well a model answers on images of another um per pixel than its own.

An image is resampled to the model's um per pixel, but detail that it never had does not come back.
The export measures what that costs on its tiles, and serving tells it of an image that lies where
it costs too much. Factors are the image's um per pixel over the model's: above 1 is coarser.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Self

from pydantic import Field, model_validator

from serve.contract.strict import Strict


class ScalePoint(Strict):
    """What was measured at one factor."""

    factor: float = Field(gt=0)
    label_agreement: float = Field(ge=0, le=1)
    """Share of the pixels with the label that the model gives at its own um per pixel."""
    dice: tuple[float | None, ...]
    """Of each class; None where the class is on none of the tiles."""


class ScaleCertificate(Strict):
    """The curve over factors, and the level below which serving warns."""

    num_tiles: int = Field(gt=0)
    has_masks: bool
    """Whether Dice is against masks; otherwise it is against the answers at factor 1."""
    real_detail_from: float = Field(gt=0)
    """The smallest factor at which the tiles' images have all the detail of such a source. Below
    it, images were enlarged, and the curve shows what two resamplings cost."""
    min_agreement: float = Field(ge=0, le=1)
    """Serving warns where the label agreement is below this."""
    max_dice_loss: float = Field(ge=0, le=1)
    """Serving warns where a class loses more Dice than this."""
    points: tuple[ScalePoint, ...]

    @model_validator(mode="after")
    def _check_curve(self) -> Self:
        factors = [point.factor for point in self.points]
        if 1.0 not in factors or factors != sorted(set(factors)):
            raise ValueError(f"factors are {factors}, expected ascending ones with 1")
        if len({len(point.dice) for point in self.points}) > 1:
            raise ValueError("the points have Dice of different numbers of classes")
        return self

    def at(self, factor: float) -> ScalePoint:
        """The curve at a factor: linear between two points, the last one beyond them."""
        first, last = self.points[0], self.points[-1]
        if factor <= first.factor:
            return first
        for low, high in pairwise(self.points):
            if factor <= high.factor:
                share = (factor - low.factor) / (high.factor - low.factor)
                return ScalePoint(
                    factor=factor,
                    label_agreement=_between(low.label_agreement, high.label_agreement, share),
                    dice=tuple(
                        None if one is None or other is None else _between(one, other, share)
                        for one, other in zip(low.dice, high.dice, strict=True)
                    ),
                )
        return last

    def dice_losses(self, point: ScalePoint) -> tuple[float, ...]:
        """Dice that each class loses there; 0 if it was not measured."""
        own = next(found for found in self.points if found.factor == 1.0)
        return tuple(
            0.0 if before is None or after is None else before - after
            for before, after in zip(own.dice, point.dice, strict=True)
        )

    def holds(self, point: ScalePoint) -> bool:
        """Whether a point stays above the level."""
        return (
            point.label_agreement >= self.min_agreement
            and max(self.dice_losses(point), default=0.0) <= self.max_dice_loss
        )

    def warning(self, image_mpp: float, model_mpp: float, class_names: Sequence[str]) -> str | None:
        """What to tell of an image whose answers may be worse than the model's usual ones.

        Args:
            image_mpp: um per pixel of the image.
            model_mpp: um per pixel of the model.
            class_names: of the manifest.

        Returns:
            One sentence, or None where the certificate holds. An image finer than all that was
            measured has the detail, so the finest point speaks for it; one that is coarser than
            all of it is always told of.
        """
        factor = image_mpp / model_mpp
        point = self.at(factor)
        found = f"{image_mpp:.4g} um per pixel, {factor:.3g} times the model's {model_mpp:.4g}"
        beyond = factor > self.points[-1].factor
        if self.holds(point):
            return (
                f"{found}: the export checked the model only up to {point.factor:g} times; detail "
                "that the image lacks may change its labels"
                if beyond
                else None
            )
        reasons = []
        if point.label_agreement < self.min_agreement:
            reasons.append(
                f"{point.label_agreement:.1%} of the labels stayed the same "
                f"(at least {self.min_agreement:.0%} expected)"
            )
        losses = self.dice_losses(point)
        if max(losses, default=0.0) > self.max_dice_loss:
            worst = max(range(len(losses)), key=losses.__getitem__)
            reasons.append(
                f"{class_names[worst]} lost {100 * losses[worst]:.1f} Dice points "
                f"(at most {100 * self.max_dice_loss:.0f} expected)"
            )
        at = f", measured at {point.factor:g} times" if beyond else ""
        return f"{found}: in the export's check{at}, {' and '.join(reasons)}"


def _between(low: float, high: float, share: float) -> float:
    return low + (high - low) * share
