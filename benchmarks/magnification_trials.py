"""What the study across magnifications trains: the methods, and one setting changed at a time."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from train.pretraining.magnification.study import METHODS
from train.pretraining.settings import PretrainSettings

Changes = Mapping[str, Mapping[str, object]]
"""Values to replace, by group of settings and name."""


@dataclass(frozen=True)
class Trial:
    """One row of a report: a method, and what is changed of the preset."""

    name: str
    method: str
    changes: Changes = field(default_factory=dict)
    steps_factor: int = 1

    def settings(self, base: PretrainSettings, seed: int) -> PretrainSettings:
        """The preset with this trial's changes, and steps for equal student tokens."""
        groups = {
            group: replace(getattr(base, group), **values) for group, values in self.changes.items()
        }
        changed = replace(base, **groups)
        schedule = replace(changed.schedule, steps=changed.schedule.steps * self.steps_factor)
        return METHODS[self.method].settings(replace(changed, schedule=schedule), seed)


COMPARED = tuple(
    Trial(name, name)
    for name in ("mad", "dino-mixed", "dino-continuous", "dino-coarse", "mad-shuffled", "mad-dense")
)
"""Methods that are compared with all seeds."""
VARIATIONS = (
    Trial("mad-2x-steps", "mad", steps_factor=2),
    Trial("dino-mixed-2x-steps", "dino-mixed", steps_factor=2),
    Trial("mad-lr-3e-4", "mad", {"schedule": {"learning_rate": 3e-4}}),
    Trial("mad-lr-3e-3", "mad", {"schedule": {"learning_rate": 3e-3}}),
    Trial("mad-no-spread", "mad", {"distillation": {"spread_weight": 0.0}}),
    Trial("mad-spread-1", "mad", {"distillation": {"spread_weight": 1.0}}),
    Trial("mad-4096-prototypes", "mad", {"distillation": {"prototypes": 4096}}),
    Trial("mad-mild-stain", "mad", {"views": {"stain_jitter": 0.3}}),
)
"""One setting changed at a time, one seed each."""
TRIALS = {trial.name: trial for trial in (*COMPARED, *VARIATIONS)}
