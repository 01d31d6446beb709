from concurrent.futures import Future
from contextlib import closing
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from serve.contract.errors import BackendUnavailableError
from serve.contract.manifest import LOW_RES_STRIDE
from serve.images.readers.reader import Bounds, RegionReader
from serve.images.readers.registry import open_reader
from serve.images.tiles import Blend, cut, pad_to_tiles
from serve.slides.errors import OutputError, ResultError
from serve.slides.plan import Plan, open_view
from serve.slides.reuse import Use
from serve.slides.store import CONFIDENCE, LABELS, WorkFolder
from serve.slides.tile_answers import Stages, Tile, TileAnswers
from serve.slides.tiling import Tiling
from serve.slides.tissue import mask_shape
from serve.slides.worker import BlockWorker
from tests.support.errors import raises
from tests.support.real_slide import real_slide
from tests.support.slide_models import PositionModel, mean_colors, model_info
from tests.support.slide_runs import Stop, begin
from tests.support.slides import VirtualSlide, position_byte

pytestmark = pytest.mark.slow


def run(work: WorkFolder, plan: Plan, reader: RegionReader, **options: Any) -> PositionModel:
    model = PositionModel()
    with BlockWorker(work, model, reader=reader, max_batch_size=2, **options) as worker:
        worker.run([b for b in Tiling(plan, work.mask()).blocks if b not in work.records()])
    return model


def stored(work: WorkFolder) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    group = zarr.open_group(work.store, mode="r")
    labels, confidence = (np.asarray(group[name]) for name in (LABELS, CONFIDENCE))
    return labels, confidence


def virtual(folder: Path, size: tuple[int, int] = (700, 900), **options: Any) -> VirtualSlide:
    folder.mkdir(exist_ok=True)
    path = folder / "slide"
    path.write_bytes(b"virtual")
    return VirtualSlide(path, size, **options)


@pytest.mark.parametrize("block", [128, 192, 1024])
def test_blocks_of_any_size_are_the_blend_of_the_whole_image(block: int, tmp_path: Path) -> None:
    with open_reader(real_slide(), mpp=0.5) as reader:
        work, plan = begin(tmp_path / "work", reader, tile=256, block_cells=block)
        run(work, plan, reader)
        image = reader.read(0, 0, 0, reader.width_px, reader.height_px)
    padded = pad_to_tiles(image, 256)
    blend = Blend(3, padded.shape[0], padded.shape[1], 256)
    for origin, tile in cut(padded, 256):
        blend.add(origin, mean_colors(tile), np.zeros(3, np.float32))
    probabilities = blend.probabilities()
    rows, columns = plan.shape
    labels, confidence = stored(work)
    assert np.array_equal(labels, probabilities.argmax(axis=0)[:rows, :columns] + 1)
    assert np.array_equal(confidence, np.rint(probabilities.max(axis=0))[:rows, :columns])


@pytest.mark.parametrize("seed", range(12))
def test_every_cell_is_of_its_own_pixels(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes, scales, overlaps, masks, bounds and levels at random; a cell says where it is."""
    rng = np.random.default_rng(seed)
    keeps_all = seed % 3 > 0
    if not keeps_all:  # some answers of a block's edge, not all
        monkeypatch.setattr("serve.slides.worker.MOST_KEPT_BYTES", 20_000)
    height, width = (int(rng.integers(30, 1500)) for _ in range(2))
    bounds = None
    if rng.random() < 0.5:
        y, x = int(rng.integers(0, height // 2)), int(rng.integers(0, width // 2))
        bounds = Bounds(x, y, int(rng.integers(9, width - x)), int(rng.integers(9, height - y)))
    levels = [(1,), (1, 4), (1, 2, 4.03), (1, 16)][rng.integers(4)]
    reader = virtual(tmp_path / "in", (height, width), downsamples=levels, bounds=bounds)
    mpp = float(rng.choice([0.5, 0.505, 0.77, 1.0, 2.0, 2.3, 0.4]))
    view = open_view(reader, model_info(mpp=mpp))
    mask = rng.random(mask_shape(view)) < rng.choice([0.02, 0.5, 1])
    work, plan = begin(
        tmp_path / "work",
        reader,
        mask,
        tile=int(rng.choice([32, 64, 128])),
        mpp=mpp,
        overlap=float(rng.choice([0, 0.125, 0.25, 0.5])),
        block_cells=int(rng.choice([16, 48, 512])),
    )
    model = run(work, plan, reader, read_threads=3)
    labels, confidence = stored(work)
    tiling = Tiling(plan, mask)
    with_repeats = sum(tiling.num_tiles(block) for block in tiling.blocks)
    assert tiling.num_unique_tiles() <= model.num_tiles <= with_repeats
    assert not keeps_all or model.num_tiles == tiling.num_unique_tiles()
    records = work.records().values()
    assert model.num_tiles == sum(record.num_tiles - record.num_reused for record in records)

    whole = view.read(0, 0, view.height_px, view.width_px)
    means = mean_colors(pad_to_tiles(whole, 4))[:, : plan.shape[0], : plan.shape[1]]
    side = plan.mask_px // LOW_RES_STRIDE
    cells = mask.repeat(side, 0).repeat(side, 1)[: plan.shape[0], : plan.shape[1]]
    assert np.array_equal(labels, np.where(cells, means.argmax(axis=0) + 1, 0))
    assert np.array_equal(confidence, np.where(cells, means.max(axis=0), 0))
    check_places(plan, labels, confidence)


def check_places(plan: Plan, labels: NDArray[np.uint8], confidence: NDArray[np.uint8]) -> None:
    """Compare with where each cell lies in level 0, without the reader's help."""
    for axis, label in ((1, 1), (0, 2)):
        step = plan.level0_px_per_cell[axis]
        place = plan.origin_px[axis] + (np.arange(plan.shape[axis]) + 0.5) * step
        expected = position_byte(place).astype(float)
        # Not where the wave turns or the last cells are mirrored.
        sure = np.abs(np.abs(expected - 100) - 100) > step / 4 + 2
        sure[-2:] = False
        told = (labels == label) & (sure[None, :] if axis else sure[:, None])
        error = confidence - (expected[None, :] if axis else expected[:, None])
        assert np.abs(error[told]).max(initial=0) <= 1 + step / 8


def test_done_blocks_are_not_run_again_and_others_to_the_same_bytes(tmp_path: Path) -> None:
    reader = virtual(tmp_path / "in")
    work, plan = begin(tmp_path / "work", reader, block_cells=64)
    run(work, plan, reader)
    first = {path: path.read_bytes() for path in work.store.rglob("*") if path.is_file()}
    assert run(work, plan, reader).num_tiles == 0
    for marker in work.path.glob("done/*.json"):
        marker.unlink()
    run(work, plan, reader)
    assert first == {path: path.read_bytes() for path in work.store.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stops", [(1,), (70, 200), (150, 3, 40, 2)])
def test_a_block_goes_on_in_the_middle_to_the_same_bytes(
    stops: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a slow model, a block takes longer than a run that is stopped may lose."""
    reader = virtual(tmp_path / "in")
    whole, plan = begin(tmp_path / "whole", reader, block_cells=1024)
    num_tiles = run(whole, plan, reader).num_tiles
    assert not list(whole.path.rglob("*.npz"))  # a fast model saves nothing
    monkeypatch.setattr("serve.slides.worker.SAVE_EVERY_S", 0.0)
    work, plan = begin(tmp_path / "work", reader, block_cells=1024)
    (block,) = Tiling(plan, work.mask()).blocks
    done = 0
    for stop in stops:
        counts: list[int] = []

        def count(tiles: int, counts: list[int] = counts, stop: int = stop) -> None:
            counts.append(tiles)
            if len(counts) > stop:
                raise Stop

        model = PositionModel()
        with (
            BlockWorker(work, model, reader=reader, max_batch_size=2) as worker,
            pytest.raises(Stop),
        ):
            worker.run([block], on_tiles=count)
        part = work.part(block)
        assert part is not None
        assert part[0] == sum(counts) > done
        done = part[0]
    model = run(work, plan, reader)
    assert model.num_tiles == num_tiles - done
    for one, other in zip(stored(whole), stored(work), strict=True):
        assert np.array_equal(one, other)
    assert work.records()[block].num_tiles == num_tiles
    assert not list(work.path.rglob("*.npz"))


@pytest.mark.parametrize("save_every_s", [0.0, 20.0])
def test_a_worker_that_outlives_its_run_leaves_a_slide_that_was_begun_anew_alone(
    save_every_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.slides.worker.SAVE_EVERY_S", save_every_s)
    reader = virtual(tmp_path / "in")
    work, plan = begin(tmp_path / "work", reader, block_cells=1024)
    mask = work.mask()
    newer = plan.model.model_copy(update={"version": "newer"})

    def begin_anew(_: int) -> None:
        work.remove()
        work.begin(plan.model_copy(update={"model": newer}), mask)

    with (
        BlockWorker(work, PositionModel(), reader=reader, max_batch_size=2) as worker,
        raises(ResultError, work.path, "begun anew"),
    ):
        worker.run(Tiling(plan, mask).blocks, on_tiles=begin_anew)
    assert work.records() == {}
    assert not list(work.path.rglob("*.npz"))
    assert not any(array.any() for array in stored(work))


def test_a_part_that_cannot_be_read_is_computed_again(tmp_path: Path) -> None:
    reader = virtual(tmp_path / "in")
    work, plan = begin(tmp_path / "work", reader, block_cells=1024)
    (block,) = Tiling(plan, work.mask()).blocks
    for content in (b"", b"PK\x03\x04 cut off"):
        part = work.path / "parts" / f"{block.name}.npz"
        part.parent.mkdir(exist_ok=True)
        part.write_bytes(content)
        assert work.part(block) is None
    assert run(work, plan, reader).num_tiles == Tiling(plan, work.mask()).num_tiles(block)


def test_a_slow_model_has_few_tiles_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is at work is lost when the run is killed."""
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0])
    monkeypatch.setattr("serve.slides.tile_answers.time", clock)
    _, plan = begin(tmp_path / "work", virtual(tmp_path / "in"), block_cells=1024)
    tile = Tile(Use(0, 0, is_kept=False, keep=False), np.zeros((64, 64, 3), np.uint8))

    class Slow(PositionModel):
        seconds = 0.0

        def submit(self, tile: NDArray[np.uint8], outputs: Any) -> Any:
            found = super().submit(tile, outputs).result()

            def result() -> Any:
                now[0] += self.seconds
                return found

            return SimpleNamespace(result=result, cancel=lambda: cancelled.append(tile))

    at_work: list[int] = []
    cancelled: list[object] = []
    for seconds in (0.01, 5.0, 30.0):
        model = Slow()
        model.seconds = seconds
        answers = TileAnswers(plan, model, Stages(), most_pending=16, soon_s=20.0)
        with closing(answers.in_order(repeat(tile))) as answered:
            for number in (1, 2):
                next(answered)
                at_work.append(model.num_tiles - number)
    assert at_work == [2, 16, 2, 4, 2, 2]
    assert len(cancelled) == 16 + 4 + 2


def test_tiles_without_tissue_in_the_block_do_not_run(tmp_path: Path) -> None:
    reader = virtual(tmp_path / "in")
    mask = np.zeros(mask_shape(reader.at_mpp(0.5)), bool)
    mask[3, 3] = True
    work, plan = begin(tmp_path / "work", reader, mask, block_cells=64)
    model = run(work, plan, reader)
    assert 1 <= model.num_tiles <= 4
    assert len(work.records()) == 1
    assert np.count_nonzero(stored(work)[0]) == (plan.mask_px // LOW_RES_STRIDE) ** 2


def test_a_failing_model_names_the_tile_and_leaves_no_marker(tmp_path: Path) -> None:
    class Failing(PositionModel):
        def submit(self, tile: NDArray[np.uint8], outputs: Any) -> Future[Any]:
            if self.num_tiles <= 20:
                return super().submit(tile, outputs)
            future: Future[Any] = Future()
            future.set_exception(BackendUnavailableError("out of memory"))
            return future

    reader = virtual(tmp_path / "in")
    work, plan = begin(tmp_path / "work", reader, block_cells=1024)
    tiling = Tiling(plan, work.mask())
    rows = tiling.tile_rows(tiling.blocks[0])
    x, y = [(x, row.y) for row in rows for x in row.x][21]
    with (
        BlockWorker(work, Failing(), reader=reader) as worker,
        raises(BackendUnavailableError, "slide", f"tile at x {x}, y {y} of level 0"),
    ):
        worker.run(tiling.blocks)
    assert work.records() == {}


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = virtual(tmp_path / "in")
    work, plan = begin(tmp_path / "work", reader, block_cells=64)

    async def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("zarr.storage.LocalStore.set", full)
    with raises(OutputError, "No space left"):
        run(work, plan, reader)
    assert work.records() == {}
