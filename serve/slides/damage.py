"""Work in progress that was damaged, such as by a power failure: found when a run goes on with it.

What a damaged block was is not known, so it is computed again, as if it had never been done.
"""

from pathlib import Path

import numpy as np
import zarr
import zarr.errors
from numpy.typing import NDArray

from serve.slides.block_record import BlockRecord, count_cells
from serve.slides.plan import Block, Plan
from serve.slides.store import CONFIDENCE, LABELS, WorkFolder

ZARR_ERRORS = (
    zarr.errors.BaseZarrError,
    FileNotFoundError,
    ValueError,
    AttributeError,
    KeyError,
    TypeError,
    RuntimeError,
)
"""What zarr and its codecs raise on missing or broken metadata and chunks. What else the system
raises is no damage: a network share may be away for a moment."""
Arrays = list["zarr.Array[np.uint8]"]
Cells = tuple[NDArray[np.uint8], NDArray[np.uint8]]


def forget_damaged(work: WorkFolder, plan: Plan) -> None:
    """Have blocks computed again whose cells are not those that their record counted.

    Of a block without a record, files that cannot be read are removed: zarr would read them to
    add to them. Others are left, as a worker of an earlier run may still be writing them.

    Args:
        work: a slide's folder that is begun, and that no other process works on.
        plan: of the slide.

    Raises:
        OutputError: the folder cannot be written to.
        OSError: it cannot be read.
    """
    arrays = _arrays(work, plan)
    if arrays is None:
        work.begin_anew(plan)
        return
    records = work.records()
    for block in plan.all_blocks():
        if block not in records and not any(path.exists() for path in work.shards(block)):
            continue
        cells = _cells(arrays, plan, block)
        if cells is None or (block in records and not _is_as_computed(cells, records[block])):
            work.forget(block)


def _arrays(work: WorkFolder, plan: Plan) -> "Arrays | None":
    """Labels and confidence; None where they cannot be opened."""
    try:
        group = zarr.open_group(work.store, mode="r")
        found = [group[name] for name in (LABELS, CONFIDENCE)]
        groups = [group[str(above)] for above in Path(LABELS).parents[:-1]]  # that outputs add to
    except ZARR_ERRORS:
        return None
    arrays = [array for array in found if isinstance(array, zarr.Array)]
    is_whole = all(isinstance(one, zarr.Group) for one in groups)
    return arrays if is_whole and [one.shape for one in arrays] == [plan.shape] * 2 else None


def _cells(arrays: "Arrays", plan: Plan, block: Block) -> Cells | None:
    """A block's labels and confidence; None where they cannot be read."""
    place = plan.rectangle(block).slices
    try:
        labels, confidence = (np.asarray(array[place]) for array in arrays)
    except ZARR_ERRORS:
        return None
    return labels, confidence


def _is_as_computed(cells: Cells, record: BlockRecord) -> bool:
    return all(getattr(record, name) == value for name, value in count_cells(*cells))
