"""Computes blocks of one slide: reading, model, blending and writing run at the same time.

A worker is opened in the process that has the model: here, or in an actor on another machine. It
needs the work folder, the bundle and the slide, and nothing else.
"""

import socket
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from itertools import chain, islice

from serve.contract.closing import Closing
from serve.contract.machine import peak_memory_mib
from serve.contract.manifest import LOW_RES_STRIDE
from serve.images.readers.reader import RegionReader
from serve.inference.batching import TileRunner
from serve.slides.ahead import ahead
from serve.slides.blend import BlendState, BlockBlend
from serve.slides.block_record import BlockRecord, count_cells
from serve.slides.pixels import TilePixels
from serve.slides.plan import Block, open_view
from serve.slides.planning import open_planned
from serve.slides.reuse import Reuse, to_run
from serve.slides.store import WorkFolder
from serve.slides.tile_answers import Answer, Stages, Tile, TileAnswers
from serve.slides.tiling import Tiling

SAVE_EVERY_S = 20.0
"""A block that takes longer is saved in the middle. With the tiles at work, a kill then loses less
than a minute, or two tiles where those take longer."""
MOST_KEPT_BYTES = 256 * 2**20
"""Answers that are kept for later blocks at the same time, so that memory does not grow with the
slide. A slide of 100,000 px across with 20 classes has 230 MB of them."""

OnTiles = Callable[[int], None]
OnBlock = Callable[[BlockRecord], None]


@dataclass(frozen=True)
class _Begin:
    block: Block
    num_done: int
    """Tiles of it that an earlier run has blended."""
    state: BlendState | None


@dataclass(frozen=True)
class _End:
    block: Block
    num_tiles: int
    num_reused: int


class BlockWorker(Closing):
    """Runs blocks of one slide with one model.

    Args:
        work: the slide's folder, begun.
        runner: the model; many workers may share it, and none closes it.
        reader: the open slide; by default opened here, and closed with this.
        max_batch_size: tiles that the model takes at once; twice as many are kept at work.
        read_threads: threads that read the slide.
        host: name of this machine, for the record.

    Raises:
        ResultError: the folder has no plan.
        SlideError: the slide cannot be opened, or is not the plan's.
    """

    def __init__(
        self,
        work: WorkFolder,
        runner: TileRunner,
        *,
        reader: RegionReader | None = None,
        max_batch_size: int = 8,
        read_threads: int = 2,
        host: str = "",
    ) -> None:
        self._plan = plan = work.plan()
        self._work = work
        self._host = host or socket.gethostname()
        self._reader = open_planned(plan) if reader is None else reader
        self._closes_reader = reader is None
        self._most_read = 2 * max_batch_size
        self._tiling = Tiling(plan, work.mask())
        cells = (plan.model.tile_size_px // LOW_RES_STRIDE) ** 2
        self._answer_bytes = len(plan.model.classes) * cells
        self._read_pool = ThreadPoolExecutor(read_threads, thread_name_prefix="slide-read")
        self._write_pool = ThreadPoolExecutor(1, thread_name_prefix="slide-write")
        view = open_view(self._reader, plan.model)
        self._pixels = TilePixels(view, plan.model.tile_size_px, self._read_pool)
        self._writing: Future[None] | None = None
        self._blend: BlockBlend | None = None
        self._block: Block | None = None
        self._blended = 0
        self._saved = time.monotonic()
        self._stages = Stages()
        self._answers = TileAnswers(
            plan, runner, self._stages, most_pending=self._most_read, soon_s=SAVE_EVERY_S
        )

    def run(
        self,
        blocks: Sequence[Block],
        *,
        turn: AbstractContextManager[object] | None = None,
        on_block: OnBlock = lambda _: None,
        on_tiles: OnTiles = lambda _: None,
    ) -> None:
        """Compute blocks, write each, and mark it as done.

        Args:
            blocks: of the plan.
            turn: held while the model is asked, where others wait for it. The first tiles are read
                before, and the last block may be written after.
            on_block: called with the record of each block that is written, in another thread.
            on_tiles: called with how many more tiles are done.

        Raises:
            SlideError: a region cannot be read, or the file was changed meanwhile.
            BackendUnavailableError: the model failed.
            OutputError: the disk is full or may not be written.
            ResultError: another run has begun the slide anew.
        """
        self._on_block, self._on_tiles = on_block, on_tiles
        with closing(ahead(self._read(blocks), self._most_read, name="slide-tiles")) as tiles:
            first = list(islice(tiles, 1))
            items: Generator[_Begin | Answer | _End]
            items = self._answers.in_order(chain(first, tiles))
            with turn or nullcontext(), closing(items):
                for item in items:
                    self._take(item)
            self._finish_writing()

    def _read(self, blocks: Sequence[Block]) -> Iterator[_Begin | Tile | _End]:
        """The tiles of all blocks, in the order in which they are blended."""
        reuse = Reuse(map(self._tiling.tile_rows, blocks), self._answer_bytes, MOST_KEPT_BYTES)
        for block in blocks:
            rows = self._tiling.tile_rows(block)
            num_done, state = self._work.part(block) or (0, None)
            yield _Begin(block, num_done, state)
            uses = reuse.uses(rows, num_done)
            tiles = self._pixels.tiles(to_run(uses))
            for use in uses:
                yield Tile(use, None if use.is_kept else next(tiles)[-1])
            self._reader.check_unchanged()
            num_reused = sum(use.is_kept for use in uses)
            yield _End(block, sum(len(row.x) for row in rows), num_reused)

    def _take(self, item: _Begin | Answer | _End) -> None:
        """Blend what comes next."""
        match item:
            case _Begin(block, num_done, state):
                model = self._plan.model
                cells = self._plan.rectangle(block)
                self._blend = BlockBlend(len(model.classes), cells, model.tile_size_px)
                if state is not None:
                    self._blend.restore(state)
                self._block, self._blended, self._saved = block, num_done, time.monotonic()
                if num_done:
                    self._on_tiles(num_done)
            case Answer(use, probabilities):
                assert self._blend is not None
                with self._stages.timed("blend"):
                    self._blend.add(use.y, use.x, probabilities)
                self._blended += 1
                self._save(self._blend)
                self._on_tiles(1)
            case _End():
                self._end(item)

    def _save(self, blend: BlockBlend) -> None:
        """Keep how far the block is, every now and then: the work of slow models is not lost."""
        if time.monotonic() - self._saved < SAVE_EVERY_S:
            return
        assert self._block is not None
        with self._stages.timed("write"):
            self._work.check_plan(self._plan)
            self._work.write_part(self._block, self._blended, blend.state())
        self._saved = time.monotonic()

    def _end(self, end: _End) -> None:
        """Decide the last cells of a block and hand it to the writing thread."""
        block = end.block
        assert self._blend is not None
        with self._stages.timed("blend"):
            self._blend.finish()
            labels, confidence = self._blend.labels, self._blend.confidence
            is_tissue = self._tiling.cell_mask(self._plan.rectangle(block))
            labels *= is_tissue
            confidence *= is_tissue
        self._blend = None
        self._finish_writing()
        seconds = self._stages.take()

        def write() -> None:
            record = BlockRecord(
                row=block.row,
                column=block.column,
                num_tiles=end.num_tiles,
                num_reused=end.num_reused,
                seconds=seconds,
                host=self._host,
                peak_memory_mib=round(peak_memory_mib()),
                **dict(count_cells(labels, confidence)),
            )
            self._work.check_plan(self._plan)
            self._work.write_block(self._plan, record, labels, confidence)
            self._on_block(record)

        self._writing = self._write_pool.submit(write)

    def _finish_writing(self) -> None:
        """Wait for the block that is being written: at most one is."""
        writing, self._writing = self._writing, None
        if writing is not None:
            with self._stages.timed("write"):
                writing.result()

    def close(self) -> None:
        """Close what was opened here."""
        self._read_pool.shutdown(cancel_futures=True)
        self._write_pool.shutdown()
        if self._closes_reader:
            self._reader.close()
