"""The rows of a comparison: Table 1 of arXiv 2604.13479, its ablation, our strategies, a U-Net.

Most derive from `train.model.class_bias.STRATEGIES`: every strategy is a row. `dfa` is also trained
from a cold start, frozen at its prior, and with the paper's L2 term in the loss. The baseline of a
preset with a small encoder is also trained with the other small encoders.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from train.errors import SettingsError
from train.model.class_bias import STRATEGIES, BiasStrategy
from train.settings import BiasName, Settings

RowName = str
"""The name of a row of `all_rows`; as in the columns of the published table."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method of the comparison: what it changes in the shared settings."""

    name: RowName
    title: str
    bias: BiasName = BiasName("none")
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What it changes besides the bias: values by section and field of the settings."""
    in_paper: bool = True
    """Whether arXiv 2604.13479 has it."""
    is_ablation: bool = False
    """Whether it belongs to the ablation, and not to Table 1."""

    @property
    def strategy(self) -> BiasStrategy:
        """Its entry in the registry."""
        return STRATEGIES[self.bias]

    @property
    def is_ours(self) -> bool:
        """Whether it is a strategy that FocalPath adds to the paper's."""
        return not (self.in_paper or self.is_ablation or self.changed("model", "network"))

    @property
    def learns_bias(self) -> bool:
        """Whether training changes its bias."""
        return self.strategy.learned and not self.changed("bias", "bias_frozen")

    def changed(self, section: str, name: str) -> Any:
        """The value that it gives a setting; None where it leaves it as it is."""
        return self.changes.get(section, {}).get(name)

    def settings(self, shared: Settings, seed: int) -> Settings:
        """The settings of this row's run."""
        own: dict[str, dict[str, Any]] = {
            "model": {"bias": self.bias},
            "bias": {"bias_init": "warm", "bias_frozen": False},
            "loss": {"focal": True},
            "optimization": {"seed": seed},
        }
        for section, values in self.changes.items():
            own[section] = {**own.get(section, {}), **values}
        sections = {name: replace(getattr(shared, name), **own[name]) for name in own}
        return replace(shared, **sections)


_DFA = BiasName("dfa")
UNET_LEARNING_RATE = 1e-3
"""AdamW's usual one for convolutions; a transformer's is lower (our choice)."""

BASELINE = Row(name="base_with_focal", title="Base w/ FL")
"""What every other row is compared with, and whose Dice HCFA starts from."""
DFA = Row(name="dfa", title="DFA", bias=_DFA)
"""The paper's method, which the ablation varies."""
COLD = Row(
    name="dfa_cold",
    title="DFA, cold start",
    bias=_DFA,
    changes={"bias": {"bias_init": "cold"}},
    is_ablation=True,
)
FROZEN = Row(
    name="dfa_frozen",
    title="DFA, frozen at its prior",
    bias=_DFA,
    changes={"bias": {"bias_frozen": True}},
    is_ablation=True,
)
"""The control: if it scores as DFA does, delta learns nothing that frequency does not tell."""
L2 = Row(
    name="dfa_l2",
    title="DFA, L2 in the loss",
    bias=_DFA,
    changes={"bias": {"bias_regularisation": "l2"}},
    in_paper=False,
    is_ablation=True,
)
"""The paper's regularisation, which erases the prior: DFA as it was before `decay`."""
UNET = Row(
    name="unet",
    title="U-Net",
    changes={
        "model": {"network": "unet", "encoders_frozen": False},
        "loss": {"iou_weight": 0.0},
        "optimization": {"learning_rate": UNET_LEARNING_RATE},
        "weights": {"sam_weights": None, "pathology_weights": None, "from_run": None},
        "runtime": {"embedding_cache": None, "exportable": False},
    },
    in_paper=False,
)
"""A plain U-Net with the same data, augmentation, loss and epochs."""


def _with_encoder(name: str, learning_rate: float) -> Row:
    """The baseline with another small encoder, and the learning rate that suits it."""
    return Row(
        name=f"encoder_{name}",
        title=f"Base w/ FL, encoder {name}",
        changes={
            "model": {"image_encoder": name},
            "optimization": {"learning_rate": learning_rate},
        },
        in_paper=False,
        is_ablation=True,
    )


def all_rows() -> dict[RowName, Row]:
    """Every row by its name: Table 1's, then the ablation's, then ours."""
    strategies = [
        Row(name=s.name, title=s.title, bias=BiasName(s.name), in_paper=s.in_paper)
        for s in STRATEGIES.values()
        if s.name != BASELINE.bias
    ]
    rows = (
        Row(name="base_without_focal", title="Base w/o FL", changes={"loss": {"focal": False}}),
        BASELINE,
        *(row for row in strategies if row.in_paper),
        COLD,
        FROZEN,
        L2,
        *(row for row in strategies if not row.in_paper),
        _with_encoder("tiny", 1e-3),  # patches embedded by one linear layer
        _with_encoder("tiny_conv", 3e-4),  # a convolutional stem without skip connections
        UNET,
    )
    return {row.name: row for row in rows}


def paper_rows() -> tuple[RowName, ...]:
    """The rows that a comparison trains by default."""
    return tuple(name for name, row in all_rows().items() if row.in_paper)


def choose_rows(names: tuple[RowName, ...]) -> tuple[Row, ...]:
    """The rows of these names and the baseline, in the order of `all_rows`.

    Raises:
        SettingsError: a name is not a row's.
    """
    rows = all_rows()
    if unknown := set(names) - set(rows):
        raise SettingsError(
            f"there is no row {min(unknown)!r}; expected some of {', '.join(rows)}. Change --rows."
        )
    return tuple(row for name, row in rows.items() if name in (*names, BASELINE.name))
