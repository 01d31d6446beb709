import csv
from pathlib import Path

import pytest
from PIL import Image

from train.fitting.curves import plot_training
from train.settings import LabelClass


@pytest.mark.slow
def test_a_training_of_254_classes_has_a_figure_with_room_for_its_lines(tmp_path: Path):
    """That the axes keep a size is a warning, and so an error, of matplotlib."""
    classes = [LabelClass(name=f"class {i}", color=f"#{i:02x}8040") for i in range(254)]
    names = [f"validation/dice/{name}" for name in ("mean", *(entry.name for entry in classes))]
    with (tmp_path / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["epoch", "loss", *names])
        rows.writerows([epoch, 1.0, *[0.5] * 255] for epoch in range(2))
    plot_training(tmp_path / "metrics.csv", classes, tmp_path / "training.png")
    with Image.open(tmp_path / "training.png") as picture:
        assert picture.width > picture.height
