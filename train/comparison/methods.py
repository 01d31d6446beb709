"""The rows of the paper's comparison: Table 1 of arXiv 2604.13479 and its ablation."""

from dataclasses import dataclass, replace
from typing import Literal

from train.settings import Settings

RowName = Literal[
    "base_without_focal", "base_with_focal", "cffa", "hcfa", "dfa", "dfa_cold", "dfa_frozen"
]
"""As in the columns of the published table; the last two are the ablation."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method of the comparison: what it changes in the shared settings."""

    name: RowName
    title: str
    bias: Literal["none", "cffa", "hcfa", "dfa"]
    bias_init: Literal["warm", "cold"] = "warm"
    bias_frozen: bool = False
    focal: bool = True

    def settings(self, shared: Settings, seed: int) -> Settings:
        """The settings of this row's run."""
        return replace(
            shared,
            bias=replace(
                shared.bias,
                bias=self.bias,
                bias_init=self.bias_init,
                bias_frozen=self.bias_frozen,
            ),
            loss=replace(shared.loss, focal=self.focal),
            optimization=replace(shared.optimization, seed=seed),
        )


BASELINE = Row(name="base_with_focal", title="Base w/ FL", bias="none")
"""What every other row is compared with, and whose Dice HCFA starts from."""
TABLE_ROWS = (
    Row(name="base_without_focal", title="Base w/o FL", bias="none", focal=False),
    BASELINE,
    Row(name="cffa", title="CFFA", bias="cffa"),
    Row(name="hcfa", title="HCFA", bias="hcfa"),
    Row(name="dfa", title="DFA", bias="dfa"),
)
"""The methods of Table 1, in its order."""
ABLATION_ROWS = (
    Row(name="dfa_cold", title="DFA, cold start", bias="dfa", bias_init="cold"),
    Row(name="dfa_frozen", title="DFA, frozen at its prior", bias="dfa", bias_frozen=True),
)
"""DFA from zero, and the control that never learns its bias."""
