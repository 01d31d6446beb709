"""What can be set for pretraining, and its presets.

Only the abstract of Magnification-Aware Distillation is known (arXiv 2512.14796). It names 10x and
40x and the pairing of context with aligned detail; every other value is from a named public recipe
or our choice, as the field's text says.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from train.checked import (
    CheckedSettings,
    Count,
    HalfAtMost,
    Mpp,
    NotNegative,
    NumberOf,
    Positive,
    Seed,
    Share,
)
from train.errors import SettingsError

Method = Literal["mad", "dino"]
Scales = Literal["coarse", "fine", "mixed", "continuous"]


@dataclass(frozen=True, kw_only=True)
class ViewSettings(CheckedSettings):
    """Which views a sample has."""

    method: Method = "mad"
    """mad: coarse views teach the fine views inside them, and the other way; dino: two views of one
    scale, the baseline."""
    pairing: Literal["aligned", "shuffled"] = "aligned"
    """shuffled: fine views are from another slide, the control that tells whether alignment
    matters."""
    dino_scales: Scales = "mixed"
    """Of dino's samples: coarse or fine alone, one scale per sample at random (mixed), or um per
    pixel log-uniform between the finest and the coarsest (continuous)."""
    coarse_mpp: Mpp = 1.0
    """um per pixel of coarse views: nominal 10x (the abstract)."""
    fine_mpps: tuple[Mpp, ...] = (0.5, 0.25)
    """um per pixel of fine views: nominal 20x (our choice) and 40x (the abstract)."""
    view_px: Annotated[int, Field(ge=32, le=1024)] = 224
    """Side of a coarse or fine view (DINOv2)."""
    num_local: Annotated[int, Field(ge=0, le=16)] = 4
    """Small views per sample, which only the student sees (DINOv2 takes 8)."""
    local_px: Annotated[int, Field(ge=16)] = 96
    """Side of a local view (DINOv2)."""
    local_share: tuple[Share, Share] = (0.22, 0.57)
    """Range of a local view's side over its coarse view's (DINOv2: 0.05 to 0.32 of the area)."""
    scale_jitter: HalfAtMost = 0.2
    """Scales are drawn within a factor of exp of this, both ways (after continuous magnification
    sampling, arXiv 2601.02198)."""
    stain_jitter: Share = 1.0
    """Strength of the independent stain jitter of each view: 1 multiplies mean optical densities by
    0.4 to 1.6 (our choice; Midnight jitters as strongly)."""

    def __post_init__(self) -> None:
        """Refuse views that cannot be drawn.

        Raises:
            SettingsError: a value is out of its range, a fine scale is not finer than the coarse
                one, or local views are larger than the others.
        """
        super().__post_init__()
        if not self.fine_mpps or max(self.fine_mpps) >= self.coarse_mpp:
            raise SettingsError(
                f"fine_mpps is {self.fine_mpps}; expected at least one um per pixel, each finer "
                f"than --coarse-mpp ({self.coarse_mpp:g}). Change --fine-mpps."
            )
        if self.local_px > self.view_px:
            raise SettingsError(
                f"local_px is {self.local_px}; expected at most --view-px ({self.view_px}). Change "
                "--local-px."
            )

    @property
    def mpps(self) -> tuple[float, ...]:
        """Um per pixel of every scale, the coarse one first."""
        return (self.coarse_mpp, *self.fine_mpps)

    @property
    def num_fine(self) -> int:
        """Fine views of a sample."""
        return len(self.fine_mpps) if self.method == "mad" else 0

    def draw_scale(self, rng: np.random.Generator) -> tuple[int, float]:
        """Index (the nearest nominal scale) and um per pixel of a sample's large views."""
        if self.method == "mad" or self.dino_scales == "coarse":
            return 0, self.coarse_mpp
        if self.dino_scales == "fine":
            return len(self.mpps) - 1, self.mpps[-1]
        if self.dino_scales == "mixed":
            index = int(rng.integers(len(self.mpps)))
            return index, self.mpps[index]
        low, high = np.log(min(self.mpps)), np.log(max(self.mpps))
        mpp = float(np.exp(rng.uniform(low, high)))
        return int(np.argmin(np.abs(np.log(self.mpps) - np.log(mpp)))), mpp


@dataclass(frozen=True, kw_only=True)
class DistillationSettings(CheckedSettings):
    """Losses, heads and the teacher."""

    align_weight: NotNegative = 1.0
    """Weight of the dense alignment between a fine view and its place in the context (ours)."""
    ibot_weight: NotNegative = 0.0
    """Weight of iBOT's masked patches on coarse views (arXiv 2111.07832)."""
    spread_weight: NotNegative = 0.1
    """Weight of KoLeo, which keeps class tokens apart within one scale (DINOv2)."""
    prototypes: Annotated[int, Field(ge=2)] = 16384
    """Outputs of the heads (DINOv2 takes 65536)."""
    head_hidden: Count = 2048
    """Width of the heads' hidden layers (DINO, arXiv 2104.14294)."""
    head_bottleneck: Count = 256
    """Width before the prototypes (DINO)."""
    student_temperature: Positive = 0.1
    """Of the student's softmax (DINO)."""
    teacher_temperature: tuple[Positive, Positive] = (0.04, 0.07)
    """Of the teacher's softmax, from start to end of the warm-up over 30% of the steps (DINO)."""
    teacher_momentum: Share = 0.994
    """Of the teacher's moving average at the start; 1 at the end, by a cosine (DINOv2)."""
    center_momentum: Share = 0.9
    """Of the moving centres, one per head and scale (DINO; per scale is our choice)."""
    frozen_prototypes: Share = 0.02
    """Share of the steps during which the heads' last layer is frozen (DINO: one epoch)."""


@dataclass(frozen=True, kw_only=True)
class EncoderSettings(CheckedSettings):
    """The vision transformer."""

    encoder: str = "vit_small_patch16_224"
    """A name of timm's; the segmenter takes patches of 14 or 16 pixels."""
    depth: Count | None = None
    """Blocks, where it is not the named model's."""
    embed_dim: Count | None = None
    """Width, where it is not the named model's."""
    num_heads: Count | None = None
    """Attention heads, where they are not the named model's."""
    layer_scale: bool = False
    """LayerScale from 1e-5, as in DINOv2."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Stochastic depth of the student (DINOv2)."""
    init_weights: str | None = None
    """File of a timm, DINO or HIPT encoder to start from; random without."""


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings(CheckedSettings):
    """Steps, optimizer and machine."""

    steps: Count = 50_000
    """Optimizer steps."""
    steps_per_epoch: Count = 500
    """Steps between two checkpoints and rows of metrics.csv."""
    batch_size: Annotated[int, Field(ge=2)] = 128
    """Samples of a step in each process."""
    learning_rate: Positive = 7e-4
    """At a batch of 1024 samples; scaled by the square root of the batch (OpenMidnight)."""
    scale_learning_rate: bool = True
    """Scale it; without, it is taken as it is."""
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps during which the learning rate rises."""
    final_learning_rate_share: Share = 0.0015
    """Where the cosine ends, over the learning rate."""
    weight_decay: tuple[NotNegative, NotNegative] = (0.04, 0.2)
    """From start to end by a cosine; not on norms and biases (DINO)."""
    gradient_clip: NotNegative = 3.0
    """Norm at which gradients are clipped (DINO)."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "bf16-mixed"
    """Of the encoders; the losses are always in float32."""
    num_workers: NumberOf = 4
    """Processes that read views."""
    devices: Count = 1
    """GPUs, or processes on a CPU."""
    collapse_patience: Count = 500
    """Steps after the warm-up with a collapsed teacher that end the run."""
    seed: Seed = 0
    """Of weights, views and order."""

    def __post_init__(self) -> None:
        """Refuse values out of their range, and steps that fill no whole epoch.

        Raises:
            SettingsError: one of these.
        """
        super().__post_init__()
        if self.steps % self.steps_per_epoch:
            raise SettingsError(
                f"steps is {self.steps}; expected a multiple of --steps-per-epoch "
                f"({self.steps_per_epoch}). Change --steps."
            )


@dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """A whole pretraining run."""

    preset: str = "gpu"
    views: ViewSettings = field(default_factory=ViewSettings)
    distillation: DistillationSettings = field(default_factory=DistillationSettings)
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)


def gpu() -> PretrainSettings:
    """ViT-S/16 on one GPU of the H100 class; its steps were timed, no encoder was trained yet."""
    return PretrainSettings()


def synthetic() -> PretrainSettings:
    """A small encoder on two cores, in minutes."""
    return PretrainSettings(
        preset="synthetic",
        views=ViewSettings(view_px=96, num_local=0, local_px=48),
        distillation=DistillationSettings(
            align_weight=0.0,
            prototypes=1024,
            head_hidden=512,
            head_bottleneck=64,
            teacher_momentum=0.99,
            frozen_prototypes=0.0,
        ),
        encoder=EncoderSettings(depth=4, embed_dim=128, num_heads=4, drop_path=0.0),
        schedule=ScheduleSettings(
            steps=1500,
            steps_per_epoch=100,
            batch_size=32,
            learning_rate=1e-3,
            scale_learning_rate=False,
            warmup_share=0.08,
            final_learning_rate_share=0.02,
            weight_decay=(0.04, 0.04),
            precision="32-true",
            num_workers=0,
        ),
    )


def ocelot() -> PretrainSettings:
    """A small encoder on OCELOT's pairs: 0.778 and 0.194 um per pixel of the same tissue."""
    views = ViewSettings(
        coarse_mpp=0.778, fine_mpps=(0.389, 0.194), view_px=96, num_local=0, local_px=48
    )
    return replace(synthetic(), preset="ocelot", views=views)


PRESETS: dict[str, Callable[[], PretrainSettings]] = {
    "gpu": gpu,
    "synthetic": synthetic,
    "ocelot": ocelot,
}
