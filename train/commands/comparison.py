"""The command `compare`: the paper's methods side by side."""

from dataclasses import dataclass
from pathlib import Path

from serve.contract.file_lock import file_lock
from train.commands.presets import Trains
from train.comparison.methods import paper_rows


class RowChoice(str):
    """The name of a row of the comparison."""


@dataclass(frozen=True, kw_only=True)
class Compare(Trains):
    """Train the rows of the paper's Table 1 and its ablation, and write tables and figures.

    Repeat the command to continue: finished runs are not repeated. To use several GPUs or cores,
    start the same command once for each (CUDA_VISIBLE_DEVICES=0, =1, ...): the processes share the
    runs in OUT, and each writes the report when all are finished.
    """

    data: Path
    """The data set, with test tiles."""
    out: Path
    """The folder to write: runs/ROW/seedN/ and report/README.md."""
    seeds: int = 5
    """Trainings of each row, with the seeds from --seed on. Fewer than 5 allow no verdict."""
    smallest_difference: float = 0.005
    """The smallest difference in Dice worth telling (our choice)."""
    rows: tuple[RowChoice, ...] = tuple(map(RowChoice, paper_rows()))
    """The rows to train, by default those of the paper. base_with_focal, which the others are
    compared with, is always trained."""
    pictures: bool = True
    """Show test images and predictions in the report. Terms of a data set may forbid it."""

    def run(self) -> None:
        """Train, score and report."""
        from train.comparison.compare import compare
        from train.comparison.report import write_report

        comparison = compare(
            self.settings,
            self.data,
            self.out,
            num_seeds=self.seeds,
            rows=self.rows,
            smallest_difference=self.smallest_difference,
            with_pictures=self.pictures,
        )
        with file_lock(self.out / ".report.lock", wait=True):
            print(f"report: {write_report(comparison, self.out / 'report')}")
