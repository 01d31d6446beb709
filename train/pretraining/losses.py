"""The losses of Magnification-Aware Distillation, and the centres that keep them from collapse.

The context term is DINO's (arXiv 2104.14294, Eq. 2) over views of two magnifications; the dense
alignment is ours; iBOT (arXiv 2111.07832, Eq. 2) and KoLeo (arXiv 2304.07193, section 4) are as
published. Letters: B samples, K prototypes, D width, N patches of a coarse view.
"""

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import Tensor, nn

_DISTANCE_EPSILON = 1e-8
_MASKED_IMAGES = 0.5
"""Share of images with masked patches (iBOT)."""
_MASKED_PATCHES = (0.1, 0.5)
"""Range of the share of their patches that is masked (iBOT)."""


def cross_entropy(targets: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """H(p, q) = -sum_k p_k log q_k of a teacher's probabilities and a student's logits.

    Args:
        targets: (..., K) float32 probabilities.
        logits: (..., K) of the student, before the temperature.
        temperature: the student's.

    Returns:
        (...) float32.
    """
    return -(targets * F.log_softmax(logits.float() / temperature, dim=-1)).sum(dim=-1)


class Centers(nn.Module):
    """Moving means of a teacher's logits, one per scale (one per scale is our choice).

    With one centre for all scales, a teacher could give each scale prototypes of its own and
    still look uniform. A step moves a centre once, by all that its head said in that step, as
    DINO does: the momentum does not depend on the number of views or losses.

    Args:
        num_scales: how many scales there are.
        num_prototypes: K.
        momentum: of the moving mean.
    """

    center: Tensor

    def __init__(self, num_scales: int, num_prototypes: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(num_scales, num_prototypes))
        self._taken: tuple[Tensor, Tensor] | None = None  # sums and counts of each scale's rows

    def probabilities(self, logits: Tensor, scales: Tensor, temperature: float) -> Tensor:
        """The teacher's targets.

        Args:
            logits: (B, K) of the teacher.
            scales: (B,) int64, the scale of each row.
            temperature: the teacher's.

        Returns:
            (B, K) float32, rows sum to 1, without gradient.
        """
        centred = logits.detach().float() - self.center[scales]
        return F.softmax(centred / temperature, dim=-1)

    @torch.no_grad()
    def take(self, logits: Tensor, scales: Tensor) -> None:
        """Note the teacher's logits (B, K), of scales (B,) int64, for the step's `move`."""
        if self._taken is None:
            self._taken = torch.zeros_like(self.center), torch.zeros_like(self.center[:, 0])
        sums, counts = self._taken
        sums.index_add_(0, scales, logits.detach().float())
        counts += torch.bincount(scales, minlength=len(counts))

    @torch.no_grad()
    def move(self) -> None:
        """Move each scale's centre once towards the mean of what was taken, over all processes."""
        if self._taken is None:
            return
        (sums, counts), self._taken = self._taken, None
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(sums)
            distributed.all_reduce(counts)
        seen = counts > 0
        means = sums[seen] / counts[seen, None]
        self.center[seen] = self.momentum * self.center[seen] + (1 - self.momentum) * means


def context_loss(targets: list[Tensor], logits: list[Tensor], temperature: float) -> Tensor:
    """DINO's term over all pairs of a teacher's and a student's view, but a view with itself.

    Args:
        targets: (B, K) for each view that the teacher sees; these views come first in `logits`.
        logits: (B, K) for each view that the student sees.
        temperature: the student's.
    """
    terms = [
        cross_entropy(target, found, temperature).mean()
        for seen, target in enumerate(targets)
        for view, found in enumerate(logits)
        if view != seen
    ]
    return torch.stack(terms).mean()


def alignment_loss(
    *,
    place_targets: Tensor,
    detail_logits: Tensor,
    detail_targets: Tensor,
    place_logits: Tensor,
    temperature: float,
) -> Tensor:
    """Dense alignment between fine views and their places in the coarse ones (ours).

    Down: the teacher's tokens at a place teach the student's fine view. Up: the teacher's fine view
    teaches the student's tokens at its place. The mean of the two.

    Args:
        place_targets: (A, B, F, K) of the teacher at each place in A coarse views.
        detail_logits: (B, F, K) of the student's fine views.
        detail_targets: (B, F, K) of the teacher's fine views.
        place_logits: (A, B, F, K) of the student at each place.
        temperature: the student's.
    """
    down = cross_entropy(place_targets, detail_logits[None], temperature).mean()
    up = cross_entropy(detail_targets[None], place_logits, temperature).mean()
    return (down + up) / 2


def pooled_at(tokens: Tensor, weights: Tensor) -> Tensor:
    """Mean of patch tokens under each fine view's footprint.

    Args:
        tokens: (B, N, D) patch tokens of one coarse view.
        weights: (B, F, G, G) with G * G = N, each summing to 1.

    Returns:
        (B, F, D).
    """
    return torch.einsum("bfn,bnd->bfd", weights.flatten(2).to(tokens.dtype), tokens)


def ibot_loss(targets: Tensor, logits: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of masked patches: a mean over each image's masked patches, then over images.

    An image without a mask counts as 0, as in DINOv2.

    Args:
        targets: (B, N, K) of the teacher, which saw the whole view.
        logits: (B, N, K) of the student, which saw the masked one.
        mask: (B, N) bool, True where the student saw the mask token.
        temperature: the student's.
    """
    masked = mask.any(dim=1)
    if not masked.any():
        return logits.sum() * 0.0
    found = cross_entropy(targets[masked], logits[masked], temperature)
    share = mask[masked].float() / mask[masked].sum(dim=1, keepdim=True)
    return (found * share).sum() / len(mask)


def koleo_loss(features: Tensor) -> Tensor:
    """KoLeo: minus the mean log distance of each vector to its nearest neighbour.

    Low where vectors are spread out. Apply it within one scale and one view index only: across
    scales it would push a fine view away from its own context.

    Args:
        features: (B, D), normalised here.
    """
    unit = F.normalize(features.float(), dim=-1)
    # Neighbours that are close differ only in digits that 16 bits do not have.
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        similarity = unit @ unit.T
        similarity.fill_diagonal_(-1)
        nearest = similarity.argmax(dim=1)
    distance = F.pairwise_distance(unit, unit[nearest], eps=_DISTANCE_EPSILON)
    return -torch.log(distance + _DISTANCE_EPSILON).mean()


def spread_loss(coarse: list[Tensor], fine: list[Tensor], scales: Tensor) -> Tensor:
    """KoLeo within one scale and one view index.

    Args:
        coarse: class tokens of each coarse view, (B, D).
        fine: of each fine view; one index has one scale.
        scales: (B,) int64, of the coarse views.
    """
    terms = [koleo_loss(tokens) for tokens in fine]
    for tokens in coarse:
        groups = [tokens[scales == scale] for scale in torch.unique(scales)]
        terms += [koleo_loss(group) for group in groups if len(group) > 1]
    return torch.stack(terms).mean() if terms else scales.sum() * 0.0


def draw_masks(patches: Tensor) -> Tensor:
    """Draw iBOT's masks (B, N) of patch tokens (B, N, D): of half of the images, 10% to 50%."""
    num_images, num_patches = patches.shape[:2]
    low, high = _MASKED_PATCHES
    shares = low + (high - low) * torch.rand(num_images, 1)
    shares = shares * (torch.rand(num_images, 1) < _MASKED_IMAGES)
    ranks = torch.rand(num_images, num_patches).argsort(dim=1).argsort(dim=1)
    return (ranks < shares * num_patches).to(patches.device)
