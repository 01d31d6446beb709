"""A slide's work in progress on disk: plan, tissue, label and confidence arrays, done blocks.

    OUT/.work/NAME/
        plan.json       written whole before the first block
        tissue.png      the mask that the plan was made with
        result/         becomes OUT/NAME when all is there
            NAME.ome.zarr
        done/R_C.json   a block whose shards are written, with its numbers
        parts/R_C.npz   a block that takes long, in the middle

Everything appears whole, by a rename. Any process may compute and write a block: the bytes are the
same, so that two at once do no harm. zarr does not write shards that are empty, so a missing shard
does not say that a block is still to do; its marker does.
"""

import io
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError
from zarr.codecs import ZstdCodec

from serve.contract.npz import read_npz
from serve.slides.blend import BlendState
from serve.slides.block_record import BlockRecord
from serve.slides.disk import appearing, write_whole, written
from serve.slides.errors import ResultError, unreadable
from serve.slides.plan import Block, Plan, differences
from serve.slides.tissue import Mask

PLAN_FILE = "plan.json"
MASK_FILE = "tissue.png"
LABELS, CONFIDENCE = "labels/classes/0", "0"
"""Arrays of the OME-Zarr group at full resolution."""
OUTPUT_MARKER = "output-"
"""Begins the names of the markers of outputs that are written."""
CHUNK_CELLS = 512
"""Side of a chunk, the least that a viewer loads. A block of another size is one chunk."""
_REMEDY = "Start the slide again with --overwrite."
"""For work in progress that cannot be read."""
_ZSTD_LEVEL = 1
"""Three takes up to half as much time again, for files that are within 3% as large."""


class WorkFolder:
    """The folder of one slide in progress; many processes may have it open.

    Args:
        path: the folder; its name is the slide's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.result = path / "result"
        self._done = path / "done"

    @property
    def store(self) -> Path:
        """The OME-Zarr group that blocks are written to."""
        return self.result / f"{self.name}.ome.zarr"

    def begin(self, plan: Plan, mask: Mask) -> None:
        """Write the plan, the mask and the empty arrays, or check that they are of this plan.

        Raises:
            ResultError: another plan's work is here; the message says what differs.
            OutputError: the folder cannot be written to.
        """
        with written(self.path):
            is_new = not self.has_plan
            if not is_new and (listed := differences(self.plan(), plan)):
                raise ResultError(
                    f"{self.path} was begun with other settings or another slide: "
                    f"{'; '.join(listed[:3])}. Start it again with --overwrite, or choose another "
                    "--out."
                )
            self._done.mkdir(parents=True, exist_ok=True)
            self.result.mkdir(exist_ok=True)
            write_whole(self.path / MASK_FILE, png_of(mask))  # the plan's, also where it was lost
            if is_new:
                self._create_arrays(plan)
                write_whole(self.path / PLAN_FILE, plan.model_dump_json(indent=2).encode())

    @property
    def has_plan(self) -> bool:
        """Whether a plan was begun here."""
        return (self.path / PLAN_FILE).is_file()

    def plan(self) -> Plan:
        """The plan that was begun here.

        Raises:
            ResultError: there is none, or it cannot be read.
        """
        try:
            return Plan.model_validate_json((self.path / PLAN_FILE).read_bytes())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ResultError(f"{self.path} has no plan: begin the slide first.") from error
        except ValidationError as error:
            raise unreadable(self.path / PLAN_FILE, _REMEDY) from error

    def check_plan(self, plan: Plan) -> None:
        """Raise ResultError where another run has begun the slide anew, with another plan.

        What is left of a run that was killed may live a while longer, on another machine.
        """
        if self.plan().key != plan.key:
            raise ResultError(f"{self.path} was begun anew by another run meanwhile.")

    def mask(self) -> Mask:
        """The tissue mask that the plan was made with.

        Raises:
            ResultError: it cannot be read.
        """
        try:
            with Image.open(self.path / MASK_FILE, formats=("PNG",)) as image:
                return np.asarray(image.convert("L")) > 0
        except (OSError, SyntaxError, ValueError) as error:
            raise unreadable(self.path / MASK_FILE, _REMEDY) from error

    def records(self) -> dict[Block, BlockRecord]:
        """The blocks that are done.

        A record that a power failure cut off counts as none, so that its block is computed again.
        """
        found = {}
        for path in sorted(self._done.glob("*.json")):
            with suppress(ValidationError):
                record = BlockRecord.model_validate_json(path.read_bytes())
                found[record.block] = record
        return found

    def num_done(self) -> int:
        """How many blocks are done."""
        return sum(1 for _ in self._done.glob("*.json"))

    def write_block(
        self,
        plan: Plan,
        record: BlockRecord,
        labels: NDArray[np.uint8],
        confidence: NDArray[np.uint8],
    ) -> None:
        """Write a block's shards, then mark it as done.

        Raises:
            OutputError: the disk is full or may not be written.
        """
        place = plan.rectangle(record.block).slices
        with written(self.path):
            group = zarr.open_group(self.store, mode="r+")
            array_of(group, LABELS)[place] = labels
            array_of(group, CONFIDENCE)[place] = confidence
            marker = self._done / f"{record.block.name}.json"
            write_whole(marker, record.model_dump_json().encode())
            self._part(record.block).unlink(missing_ok=True)

    def write_part(self, block: Block, num_tiles: int, state: BlendState) -> None:
        """Keep how far a block is.

        Args:
            block: which one.
            num_tiles: of its tiles, in order, that are blended.
            state: of the blend.

        Raises:
            OutputError: the disk is full or may not be written.
        """
        path = self._part(block)
        with written(self.path):
            path.parent.mkdir(exist_ok=True)
            arrays = {"num_tiles": np.int64(num_tiles), **state._asdict()}
            with appearing(path) as partial, partial.open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)

    def part(self, block: Block) -> tuple[int, BlendState] | None:
        """How far a block is, as `write_part` kept it; None where nothing can be read."""
        try:
            arrays = read_npz(self._part(block))
            fields: dict[str, Any] = {name: arrays[name] for name in BlendState._fields}
            state = BlendState(**{**fields, "top": int(fields["top"])})
            return int(arrays["num_tiles"]), state
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def _part(self, block: Block) -> Path:
        return self.path / "parts" / f"{block.name}.npz"

    def shards(self, block: Block) -> list[Path]:
        """The files of a block's labels and confidence; those without content are not there."""
        place = Path("c", str(block.row), str(block.column))
        return [self.store / name / place for name in (LABELS, CONFIDENCE)]

    def forget(self, block: Block) -> None:
        """Have a block computed again, and all outputs written again.

        Raises:
            OutputError: the folder cannot be written to.
        """
        with written(self.path):
            (self._done / f"{block.name}.json").unlink(missing_ok=True)
            for shard in self.shards(block):
                shard.unlink(missing_ok=True)
            self.forget_outputs()

    def begin_anew(self, plan: Plan) -> None:
        """Have all blocks computed again.

        Raises:
            OutputError: the folder cannot be written to.
        """
        with written(self.path):
            for folder in (self._done, self.path / "parts", self.result):
                shutil.rmtree(folder, ignore_errors=True)
            self._done.mkdir()
            self.result.mkdir()
            self.forget_outputs()
            self._create_arrays(plan)

    def forget_outputs(self) -> None:
        """Have outputs that were written before written again."""
        for marker in self.path.glob(f"{OUTPUT_MARKER}*"):
            marker.unlink()

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _create_arrays(self, plan: Plan) -> None:
        group = zarr.open_group(self.store, mode="w", zarr_format=3)
        for name in (LABELS, CONFIDENCE):
            create_array(group, name, plan.shape, plan.settings.block_cells)


def create_array(
    group: zarr.Group, name: str, shape: tuple[int, int], shard_cells: int
) -> "zarr.Array[Any]":
    """An empty uint8 array, one shard per block."""
    chunk = CHUNK_CELLS if shard_cells % CHUNK_CELLS == 0 else shard_cells
    return group.create_array(
        name,
        shape=shape,
        chunks=(chunk, chunk),
        shards=(shard_cells, shard_cells),
        dtype="u1",
        compressors=ZstdCodec(level=_ZSTD_LEVEL),
        fill_value=0,
        dimension_names=("y", "x"),
        overwrite=True,
    )


def array_of(group: zarr.Group, name: str) -> "zarr.Array[Any]":
    """An array of a group that this package wrote."""
    found = group[name]
    assert isinstance(found, zarr.Array), name
    return found


def png_of(mask: Mask) -> bytes:
    """A mask as a PNG of one bit per pixel."""
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    return buffer.getvalue()
