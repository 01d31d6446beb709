"""The rows of a comparison: Table 1 of arXiv 2604.13479, its ablation, our strategies, a U-Net.

Most derive from `train.model.class_bias.STRATEGIES`: every strategy is a row. `dfa` is also trained
from a cold start, frozen at its prior, and with the paper's L2 term in the loss. The baseline of a
preset with a small encoder is also trained with the other small encoders.
"""

from dataclasses import dataclass, replace
from typing import Literal

from train.errors import SettingsError
from train.model.class_bias import STRATEGIES, BiasStrategy
from train.settings import BiasName, ImageEncoderName, NetworkName, Settings

RowName = str
"""The name of a row of `all_rows`; as in the columns of the published table."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method of the comparison: what it changes in the shared settings."""

    name: RowName
    title: str
    bias: BiasName
    bias_init: Literal["warm", "cold"] = "warm"
    bias_frozen: bool = False
    bias_regularisation: Literal["decay", "l2", "off"] | None = None
    """What keeps the bias small; None leaves it to the shared settings."""
    focal: bool = True
    network: NetworkName = "sam_path"
    image_encoder: ImageEncoderName | None = None
    """Another small encoder than the preset's; None leaves it to the shared settings."""
    learning_rate: float | None = None
    """The one that suits the encoder; None leaves it to the shared settings."""
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
        return self.network == "sam_path" and not self.in_paper and not self.is_ablation

    @property
    def learns_bias(self) -> bool:
        """Whether training changes its bias."""
        return self.strategy.learned and not self.bias_frozen

    def settings(self, shared: Settings, seed: int) -> Settings:
        """The settings of this row's run."""
        own = replace(
            shared,
            model=replace(
                shared.model,
                bias=self.bias,
                image_encoder=self.image_encoder or shared.model.image_encoder,
            ),
            bias=replace(
                shared.bias,
                bias_init=self.bias_init,
                bias_frozen=self.bias_frozen,
                bias_regularisation=self.bias_regularisation or shared.bias.bias_regularisation,
            ),
            loss=replace(shared.loss, focal=self.focal),
            optimization=replace(
                shared.optimization,
                seed=seed,
                learning_rate=self.learning_rate or shared.optimization.learning_rate,
            ),
        )
        return own if self.network == "sam_path" else _without_encoders(own, self.network)


UNET_LEARNING_RATE = 1e-3
"""AdamW's usual one for convolutions; a transformer's is lower (our choice)."""


def _without_encoders(settings: Settings, network: NetworkName) -> Settings:
    """The same training of a network that has neither encoders nor an IoU head."""
    return replace(
        settings,
        model=replace(settings.model, network=network, encoders_frozen=False),
        loss=replace(settings.loss, iou_weight=0.0),
        optimization=replace(settings.optimization, learning_rate=UNET_LEARNING_RATE),
        weights=replace(settings.weights, sam_weights=None, pathology_weights=None, from_run=None),
        runtime=replace(settings.runtime, embedding_cache=None, exportable=False),
    )


_NONE, _DFA = BiasName("none"), BiasName("dfa")

BASELINE = Row(name="base_with_focal", title="Base w/ FL", bias=_NONE)
"""What every other row is compared with, and whose Dice HCFA starts from."""
DFA = Row(name="dfa", title="DFA", bias=_DFA)
"""The paper's method, which the ablation varies."""
COLD = Row(name="dfa_cold", title="DFA, cold start", bias=_DFA, bias_init="cold", is_ablation=True)
FROZEN = Row(
    name="dfa_frozen",
    title="DFA, frozen at its prior",
    bias=_DFA,
    bias_frozen=True,
    is_ablation=True,
)
"""The control: if it scores as DFA does, delta learns nothing that frequency does not tell."""
L2 = Row(
    name="dfa_l2",
    title="DFA, L2 in the loss",
    bias=_DFA,
    bias_regularisation="l2",
    in_paper=False,
    is_ablation=True,
)
"""The paper's regularisation, which erases the prior: DFA as it was before `decay`."""
UNET = Row(name="unet", title="U-Net", bias=_NONE, network="unet", in_paper=False)
"""A plain U-Net with the same data, augmentation, loss and epochs."""

PATCHES = Row(
    name="encoder_tiny",
    title="Base w/ FL, encoder tiny",
    bias=_NONE,
    image_encoder="tiny",
    learning_rate=1e-3,
    in_paper=False,
    is_ablation=True,
)
"""Patches embedded by one linear layer, and the learning rate that the preset had with it."""
STEM = Row(
    name="encoder_tiny_conv",
    title="Base w/ FL, encoder tiny_conv",
    bias=_NONE,
    image_encoder="tiny_conv",
    learning_rate=3e-4,
    in_paper=False,
    is_ablation=True,
)
"""A convolutional stem without skip connections, with the learning rate that it had."""


def all_rows() -> dict[RowName, Row]:
    """Every row by its name: Table 1's, then the ablation's, then ours."""
    strategies = [
        Row(name=s.name, title=s.title, bias=BiasName(s.name), in_paper=s.in_paper)
        for s in STRATEGIES.values()
        if s.name != _NONE
    ]
    rows = (
        Row(name="base_without_focal", title="Base w/o FL", bias=_NONE, focal=False),
        BASELINE,
        *(row for row in strategies if row.in_paper),
        COLD,
        FROZEN,
        L2,
        *(row for row in strategies if not row.in_paper),
        PATCHES,
        STEM,
        UNET,
    )
    return {row.name: row for row in rows}


def paper_rows() -> tuple[RowName, ...]:
    """The rows that a comparison trains unless it is told otherwise."""
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
