"""Encoders side by side: pretrain the methods of a study, each seed once, with equal compute.

OUT/encoders/METHOD/seedN/   a pretraining run each; finished ones are not trained again
OUT/report/                  what `train.pretraining.magnification.report` writes
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from train.errors import RunError, SettingsError
from train.pretraining.encoder import create_encoder, patch_size
from train.pretraining.run import ENCODER_FOLDER, pretrain, trained_otherwise
from train.pretraining.settings import PretrainSettings, ViewSettings
from train.pretraining.sources import open_source
from train.pretraining.split_source import SplitSource


@dataclass(frozen=True)
class Method:
    """One way to pretrain, as a change of a preset."""

    views: Mapping[str, object]
    align_weight: float | None = None
    """Weight of the dense alignment; None leaves the preset's."""

    def settings(self, base: PretrainSettings, seed: int) -> PretrainSettings:
        """The preset with this method's changes, and steps for equal student tokens."""
        views: ViewSettings = replace(base.views, **self.views)  # type: ignore[arg-type]
        distillation = base.distillation
        if self.align_weight is not None:
            distillation = replace(distillation, align_weight=self.align_weight)
        changed = replace(base, views=views, distillation=distillation)
        schedule = base.schedule
        budget = schedule.steps * student_tokens(base)
        epochs = budget / (student_tokens(changed) * schedule.steps_per_epoch)
        steps = max(1, round(epochs)) * schedule.steps_per_epoch
        return replace(changed, schedule=replace(schedule, seed=seed, steps=steps))


METHODS: dict[str, Method] = {
    "dino-coarse": Method({"method": "dino", "dino_scales": "coarse"}),
    "dino-fine": Method({"method": "dino", "dino_scales": "fine"}),
    "dino-mixed": Method({"method": "dino", "dino_scales": "mixed"}),
    "dino-continuous": Method({"method": "dino", "dino_scales": "continuous"}),
    # Fine views are from another slide: the control that tells whether alignment matters.
    "mad-shuffled": Method({"method": "mad", "pairing": "shuffled"}, align_weight=0.0),
    "mad": Method({"method": "mad"}, align_weight=0.0),  # the context loss alone
    "mad-dense": Method({"method": "mad"}, align_weight=1.0),
}
"""The methods that a study can compare. A new one is one entry."""


def student_tokens(settings: PretrainSettings) -> int:
    """Patch tokens that the student sees of one sample."""
    patch = patch_size(create_encoder(settings))
    views = settings.views
    large = (2 + views.num_fine) * (views.view_px // patch) ** 2
    return int(large + views.num_local * (views.local_px // patch) ** 2)


def pretrain_methods(
    base: PretrainSettings, data: Path, out: Path, methods: Sequence[str], num_seeds: int
) -> dict[str, list[Path]]:
    """Pretrain each method with each seed, and return the encoders' folders by method.

    Raises:
        SettingsError: a method is unknown or there twice, or there are no seeds.
        RunError: an encoder is there that was trained with other settings, or on other slides.
        FocalPathError: a run fails.
    """
    for name in methods:
        if name not in METHODS:
            raise SettingsError(
                f"no method {name!r}; expected one of {', '.join(METHODS)}. Change --methods."
            )
    if len(set(methods)) < len(methods):
        raise SettingsError(
            f"--methods names one twice ({', '.join(methods)}); expected each once. Give --seeds "
            "for more runs of each."
        )
    if num_seeds < 1:
        raise SettingsError(f"--seeds is {num_seeds}; expected at least 1")
    found = open_source(data)
    encoders: dict[str, list[Path]] = {}
    for number in range(num_seeds):
        for name in methods:
            run = out / "encoders" / name / f"seed{number}"
            encoder = run / ENCODER_FOLDER
            settings = METHODS[name].settings(base, base.schedule.seed + number)
            if encoder.exists():
                _refuse_others(run, settings, found)
            else:
                print(f"{name}, seed {number}: {settings.schedule.steps} steps", flush=True)
                pretrain(settings, data, run, resume=(run / "last.ckpt").is_file())
            encoders.setdefault(name, []).append(encoder)
    return encoders


def _refuse_others(run: Path, settings: PretrainSettings, found: SplitSource) -> None:
    """Raise RunError for a finished run that would stand for what it is not.

    That is one of other settings, or one that may have learned from slides that are for testing.
    """
    if changes := trained_otherwise(run, settings, found):
        raise RunError(
            f"{run} was trained otherwise: {', '.join(changes)}; expected the same settings and "
            "data for all encoders of a study. Give another --out, or remove that folder."
        )
