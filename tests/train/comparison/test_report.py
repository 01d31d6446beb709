import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.toy_comparison import CLASSES, NUM_TILES, confusion, toy_comparison, with_panels
from tests.support.toy_data import toy_settings
from train.comparison.bootstrap import (
    NUM_RESAMPLES,
    Bootstrap,
    Difference,
    Interval,
    resample_dice,
    seed_scores,
)
from train.comparison.claim import Claim, claim_section, judge_claim
from train.comparison.compare import Comparison
from train.comparison.figures import correlate
from train.comparison.methods import RowName, all_rows, paper_rows
from train.comparison.report import write_report
from train.comparison.tables import Table1
from train.config import read_settings
from train.fitting.leverage import Leverage
from train.intervals import bootstrap_interval, draw_counts, percentiles
from train.metrics import class_scores
from train.model.class_bias import STRATEGIES, BiasStrategy, no_bias
from train.settings import LabelClass, RuntimeSettings, WeightsSettings

BASE: RowName = "base_with_focal"
ALL_ROWS = list(paper_rows())


@pytest.fixture(scope="module")
def report(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of all rows, each a little better than the one before, two seeds."""
    folder = tmp_path_factory.mktemp("report")
    accuracies = {name: (0.7 + 0.02 * i, 0.71 + 0.02 * i) for i, name in enumerate(ALL_ROWS)}
    minutes = {name: 2.0 for name in ALL_ROWS} | {"hcfa": 3.0}
    comparison = toy_comparison(accuracies, minutes=minutes)
    comparison = with_panels(comparison, toy_data, folder / "panels")
    write_report(comparison, folder / "report")
    return folder / "report"


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# Bootstrap


def test_a_rows_dice_is_that_of_its_pooled_tiles():
    bootstrap = Bootstrap(toy_comparison({BASE: (0.8,)}))
    pooled = class_scores(torch.from_numpy(confusion(0.8).sum(axis=0)))
    estimates = [interval.estimate for interval in bootstrap.dice(BASE)]
    assert estimates == pytest.approx([pooled.mean_dice, *pooled.dice.tolist()])


def test_an_interval_is_that_of_pooled_resamples_drawn_one_by_one():
    tiles = confusion(0.8)
    rng = np.random.default_rng(7)
    means = [
        class_scores(torch.from_numpy(tiles[rng.integers(0, NUM_TILES, NUM_TILES)].sum(axis=0)))
        .dice.mean()
        .item()
        for _ in range(3000)
    ]
    interval = Bootstrap(toy_comparison({BASE: (0.8,)})).dice(BASE)[0]
    width = interval.high - interval.low
    expected = np.quantile(means, percentiles((1, NUM_TILES)))
    assert [interval.low, interval.high] == pytest.approx(expected, abs=0.05 * width)


def test_differences_are_paired_so_that_equal_rows_differ_by_nothing():
    bootstrap = Bootstrap(toy_comparison({BASE: (0.8, 0.82), "dfa": (0.8, 0.82)}))
    assert bootstrap.dice("dfa")[0].high > bootstrap.dice("dfa")[0].low
    assert bootstrap.differences("dfa")[0].interval == (0, 0, 0)


def test_seeds_are_averaged():
    bootstrap = Bootstrap(toy_comparison({BASE: (0.7, 0.8), "dfa": (0.8, 0.8)}))
    difference = bootstrap.differences("dfa")[0]
    assert difference.per_seed[1] == 0
    assert difference.interval.estimate == pytest.approx(difference.per_seed[0] / 2)


@pytest.mark.parametrize("num_predicted", [0, 1])
def test_a_class_without_a_test_pixel_is_in_no_mean_whether_predicted_or_not(num_predicted: int):
    comparison = toy_comparison({BASE: (0.8,)})
    result = comparison.results[BASE, 0]
    tiles = result.confusion.copy()
    tiles[:, 4, :] = tiles[:, :, 4] = 0
    tiles[:, 0, 4] = num_predicted
    comparison.results[BASE, 0] = replace(result, confusion=tiles)
    mean, *classes = Bootstrap(comparison).dice(BASE)
    assert np.isnan(classes[4]).all()
    assert mean.estimate == pytest.approx(np.mean([interval.estimate for interval in classes[:4]]))
    assert mean.low < mean.estimate < mean.high


def test_the_interval_of_a_class_is_expanded_for_the_cases_that_have_it():
    comparison = toy_comparison({BASE: (0.8,)})
    tiles = comparison.results[BASE, 0].confusion
    tiles[6:, 4] = 0
    _, cases = np.unique([t.tile_id for t in comparison.data.tiles["test"]], return_inverse=True)
    drawn = draw_counts(np.random.default_rng(0), NUM_TILES, NUM_RESAMPLES)
    expected = bootstrap_interval(resample_dice(tiles, cases, drawn)[:, 5], (1, 6))
    assert Bootstrap(comparison).dice(BASE)[5][1:] == expected


def of_two_patients(comparison: Comparison) -> Comparison:
    tiles = comparison.data.tiles["test"]
    of_patients = tuple(replace(tile, group=f"patient {i // 6}") for i, tile in enumerate(tiles))
    data = replace(comparison.data, tiles={**comparison.data.tiles, "test": of_patients})
    return replace(comparison, data=data)


def test_images_of_one_patient_are_drawn_together():
    comparison = toy_comparison({BASE: (0.8,)})
    alone, together = (
        Bootstrap(entry).dice(BASE)[0] for entry in (comparison, of_two_patients(comparison))
    )
    assert together.estimate == alone.estimate
    assert together.high - together.low > 1.2 * (alone.high - alone.low)


def test_an_interval_covers_other_seeds_too():
    alike = Bootstrap(toy_comparison({BASE: (0.75,) * 5})).dice(BASE)[0]
    apart = Bootstrap(toy_comparison({BASE: (0.65, 0.7, 0.75, 0.8, 0.85)})).dice(BASE)[0]
    assert apart.estimate == pytest.approx(alike.estimate, abs=1e-3)
    assert apart.high - apart.low > 2 * (alike.high - alike.low)


@pytest.mark.parametrize(
    ("dfa", "verdict"),
    [
        ((0.80,) * 5, "higher"),
        ((0.60,) * 5, "lower"),
        ((0.701,) * 5, "equal"),
        ((0.69, 0.80, 0.69, 0.80, 0.69), "undecided"),
        ((0.80,) * 4, "undecided"),
    ],
)
def test_a_difference_is_told_by_its_interval_its_size_and_the_number_of_seeds(
    dfa: tuple[float, ...], verdict: str
):
    comparison = toy_comparison({BASE: (0.7,) * len(dfa), "dfa": dfa})
    assert Bootstrap(comparison).differences("dfa")[0].verdict == verdict


def test_a_difference_below_the_smallest_is_never_higher():
    values = {BASE: (0.7,) * 5, "dfa": (0.72,) * 5}
    comparison = toy_comparison(values)
    assert Bootstrap(comparison).differences("dfa")[0].verdict == "higher"
    strict = replace(comparison, smallest_difference=0.1)
    assert Bootstrap(strict).differences("dfa")[0].verdict == "equal"


# The claim about hard classes


@pytest.mark.parametrize(
    ("accuracies", "holds"),
    [
        ((0.75,) * 5, True),
        ((0.75,) * 4, False),  # too few seeds
        ((0.705,) * 5, False),  # too small a gain
        ((0.9, 0.9, 0.4, 0.9, 0.9), False),  # seeds disagree
        ((0.6,) * 5, False),  # a loss
    ],
)
def test_a_claim_about_hard_classes_needs_size_seeds_and_an_interval(
    accuracies: tuple[float, ...], holds: bool
):
    comparison = toy_comparison({BASE: (0.7,) * len(accuracies), "dfa_masks": accuracies})
    bootstrap = Bootstrap(comparison)
    claim = judge_claim(bootstrap, all_rows()["dfa_masks"])
    assert list(claim.hard) == ["Necrosis", "Other"]
    assert list(claim.others) == ["Tumor", "Stroma", "Inflammatory"]
    assert claim.holds is holds
    assert f"| {'yes' if holds else 'no'} |" in " ".join(claim_section(bootstrap).split())


def test_a_claim_fails_where_another_class_loses_too_much():
    lost = Difference(Interval(-0.006, -0.01, 0.0), (-0.006,) * 5, 0.005)
    kept = Difference(Interval(-0.004, -0.01, 0.0), (-0.004,) * 5, 0.005)
    gained = Difference(Interval(0.02, 0.01, 0.03), (0.02,) * 5, 0.005)
    assert Claim({"a": gained}, {"b": kept}).holds
    assert not Claim({"a": gained}, {"b": lost}).holds
    assert not Claim({}, {"b": kept}).holds


# Tables


def test_table_1_has_mean_and_sample_deviation_over_seeds(report: Path):
    expected = seed_scores(toy_comparison({BASE: (0.72, 0.73)}), BASE, "dice")
    mean, std = expected[:, 4].mean(), expected[:, 4].std(ddof=1)
    rows = read(report / "intervals.csv")
    line = next(row for row in rows if (row["row"], row["class"]) == (BASE, "Necrosis"))
    assert float(line["dice"]) == pytest.approx(mean, abs=1e-5)
    assert float(line["dice_std"]) == pytest.approx(std, abs=1e-5)
    text = (report / "README.md").read_text(encoding="utf-8")
    assert f"{mean:.4f} ± {std:.4f}" in text[text.index("| Necrosis") :].splitlines()[0]


def test_table_1_has_a_line_a_class_and_no_published_numbers_for_other_data(report: Path):
    text = (report / "README.md").read_text(encoding="utf-8")
    dice = text[text.index("| Dice") : text.index("| IoU")]
    names = [line.split("|")[1].strip() for line in dice.strip().splitlines()[2:]]
    assert names == ["Mean", *(entry.name for entry in CLASSES)]
    assert "*published*" not in text


def test_the_published_numbers_stand_beside_ours():
    settings = replace(toy_settings(), preset="bcss")
    table = Table1(toy_comparison({BASE: (0.7,), "dfa": (0.8,)}, settings=settings))
    lines = table.markdown().splitlines()
    inflammatory = next(i for i, line in enumerate(lines) if line.startswith("| Inflammatory"))
    assert lines[inflammatory + 1].split()[1::2] == ["published", "0.5537", "0.6493"]
    first = next(line for line in table.latex("").splitlines() if "published" in line)
    assert [cell.strip(" \\") for cell in first.split("&")] == ["published", "0.7336", "0.7826"]


def test_the_published_numbers_are_of_the_same_classes_only():
    settings = replace(toy_settings(), preset="bcss")
    classes = (*CLASSES[:4], LabelClass(name="Fat", color="#000000"))
    assert not Table1(toy_comparison({BASE: (0.7,)}, settings=settings, classes=classes)).published


def test_the_highest_mean_is_bold_and_ties_are_not():
    better = Table1(toy_comparison({BASE: (0.7,), "dfa": (0.8,)})).markdown()
    marked = [line.count("**") for line in better.splitlines() if " 0." in line]
    assert marked == [2] * 2 * (1 + len(CLASSES))
    assert "**" not in Table1(toy_comparison({BASE: (0.7,), "dfa": (0.7,)})).markdown()


def test_a_class_without_a_test_pixel_has_no_numbers_and_none_is_bold():
    comparison = toy_comparison({BASE: (0.7,), "dfa": (0.8,)})
    for result in comparison.results.values():
        result.confusion[:, 4, :] = result.confusion[:, :, 4] = 0
    lines = [line for line in Table1(comparison).markdown().splitlines() if "| Other" in line]
    assert [line.split()[3::2] for line in lines] == [["–", "–"]] * 2


def test_the_report_has_every_file_it_links_to(report: Path):
    text = (report / "README.md").read_text(encoding="utf-8")
    for name in ("table1.tex", "intervals.csv", "bias.csv", "run.yaml"):
        assert f"({name})" in text
        assert (report / name).stat().st_size > 0


def test_figures_are_vectors_and_pictures(report: Path):
    for number in (2, 3, 4):
        assert (report / f"figure{number}.pdf").read_bytes().startswith(b"%PDF")
        with Image.open(report / f"figure{number}.png") as picture:
            colors = picture.convert("RGB").getcolors(1 << 20)
            assert picture.width > 500
            assert colors is not None
            assert len(colors) > 10


@pytest.mark.slow
def test_few_test_cases_are_named_and_warned_about(tmp_path: Path):
    comparison = replace(of_two_patients(toy_comparison({BASE: (0.8,)})), with_pictures=False)
    text = write_report(comparison, tmp_path / "few").read_text(encoding="utf-8")
    assert f"{NUM_TILES} test images of 2 cases (patient 0, patient 1)" in text
    assert "2 test cases are few" in text
    many = replace(toy_comparison({BASE: (0.8,)}), with_pictures=False)
    assert "are few" not in write_report(many, tmp_path / "many").read_text(encoding="utf-8")


def test_hcfas_time_is_told_with_its_baselines(report: Path):
    text = (report / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## Training time") : text.index("## Figures")]
    cells = {
        (parts := [cell.strip() for cell in line.split("|")])[1]: parts[2:-1]
        for line in section.splitlines()
        if line.startswith("|")
    }
    assert cells["HCFA"] == ["3.00 ± 0.00", "4.50 ± 0.00"]
    assert cells["HCFA, with its baseline"] == ["5.00 ± 0.00", "7.50 ± 0.00"]
    assert cells["DFA"] == ["2.00 ± 0.00", "3.00 ± 0.00"]


@pytest.mark.slow
def test_the_leverage_of_the_bias_is_one_line_per_method_averaged_over_seeds(tmp_path: Path):
    comparison = toy_comparison({BASE: (0.7, 0.7), "dfa": (0.8, 0.8)})
    for seed, changed in ((0, 0.125), (1, 0.375)):
        entries = tuple(
            Leverage(change=change, labels_changed=share, mean_dice=dice, dice_changes=())
            for change, share, dice in (("as trained", 0.0, 0.5), ("bias removed", changed, 0.25))
        )
        result = comparison.results["dfa", seed]
        comparison.results["dfa", seed] = replace(result, leverage=entries)
    folder = tmp_path / "report"
    text = write_report(replace(comparison, with_pictures=False), folder).read_text("utf-8")
    section = text[text.index("## Leverage") : text.index("## Training time")]
    lines = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| ")]
    assert [[cell.strip() for cell in line] for line in lines] == [
        ["Method", "bias removed"],
        ["DFA", "25.00%, -0.2500"],
    ]


def test_intervals_are_written_for_every_row_and_class(report: Path):
    rows = read(report / "intervals.csv")
    assert len(rows) == len(ALL_ROWS) * (1 + len(CLASSES))
    for row in rows:
        low, high = float(row["difference_low"]), float(row["difference_high"])
        assert low <= float(row["difference"]) <= high


def test_the_paper_claims_about_dfa_are_compared(report: Path):
    text = (report / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## Differences") : text.index("## Training time")]
    pairs = [
        (parts[1].strip(), parts[3].strip())
        for line in section.splitlines()
        if len(parts := line.split("|")) > 3
    ]
    expected = {("DFA", other) for other in ("Base w/ FL", "HCFA", "DFA, frozen at its prior")}
    assert expected < set(pairs)


@pytest.mark.slow
def test_254_classes_have_a_report(toy_data: Path, tmp_path: Path):
    """That the figures keep their axes is a warning, and so an error, of matplotlib."""
    classes = tuple(
        LabelClass(name=f"class {i}", color=f"#{i:02x}{255 - i:02x}40") for i in range(254)
    )
    comparison = toy_comparison({BASE: (0.7, 0.71), "dfa": (0.8, 0.81)}, classes=classes)
    write_report(with_panels(comparison, toy_data, tmp_path / "panels"), tmp_path / "r")
    text = (tmp_path / "r" / "README.md").read_text(encoding="utf-8")
    assert "With 254 classes the figures name none" in text


@pytest.mark.slow
def test_the_report_has_the_settings_without_this_machines_folders(toy_data: Path, tmp_path: Path):
    settings = toy_settings(
        weights=WeightsSettings(sam_weights="/home/me/sam.pth", random_encoders=True),
        runtime=RuntimeSettings(patience=3),
    )
    comparison = toy_comparison({BASE: (0.7,)}, settings=settings)
    write_report(with_panels(comparison, toy_data, tmp_path / "panels"), tmp_path / "r")
    for name in ("README.md", "run.yaml"):
        assert "/home" not in (tmp_path / "r" / name).read_text(encoding="utf-8")
    weights = replace(settings.weights, sam_weights="sam.pth")
    assert read_settings(tmp_path / "r" / "run.yaml") == replace(settings, weights=weights)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["synthetic", "bcss"])
def test_a_registered_strategy_is_in_every_table(
    preset: str, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On a data set of the paper, too, which has no number for it."""
    strategy = BiasStrategy(
        name="toy", title="Toy bias", help="Half.", initial=no_bias, learned=True
    )
    monkeypatch.setitem(STRATEGIES, "toy", strategy)
    settings = replace(toy_settings(), preset=preset)
    comparison = toy_comparison({BASE: (0.7, 0.71), "toy": (0.8, 0.81)}, settings=settings)
    write_report(with_panels(comparison, toy_data, tmp_path / "panels"), tmp_path / "r")
    for name in ("README.md", "table1.tex"):
        assert "Toy bias" in (tmp_path / "r" / name).read_text(encoding="utf-8")
    assert "toy" in {row["row"] for row in read(tmp_path / "r" / "intervals.csv")}
    assert "toy_mean" in read(tmp_path / "r" / "bias.csv")[0]
    text = (tmp_path / "r" / "README.md").read_text(encoding="utf-8")
    published = [line for line in text.splitlines() if line.startswith("| published")]
    assert bool(published) == (preset == "bcss")
    assert {line.split("|")[-2].strip() for line in published} <= {"–"}


# Correlations


def test_a_correlation_is_that_of_numpy_and_of_ranks():
    x, y = np.array([0.1, 0.4, 0.5, 0.9]), np.array([2.0, 1.5, 0.2, 0.4])
    found = correlate(x, y)
    assert found is not None
    assert found.pearson == pytest.approx(np.corrcoef(x, y)[0, 1])
    ranks = np.corrcoef(x.argsort().argsort(), y.argsort().argsort())[0, 1]
    assert found.spearman == pytest.approx(ranks)
    assert [found.slope, found.intercept] == pytest.approx(np.polyfit(x, y, 1))


@pytest.mark.parametrize("y", [[1.0, 2.0], [1.0, 1.0, 1.0]])
def test_two_classes_or_equal_values_have_no_correlation(y: list[float]):
    assert correlate(np.linspace(0, 1, len(y)), np.array(y)) is None
