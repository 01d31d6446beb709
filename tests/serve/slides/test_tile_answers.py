import weakref
from concurrent.futures import Future
from typing import Any, cast

import numpy as np

from serve.inference.batching import TileRunner
from serve.slides.plan import Plan
from serve.slides.reuse import Use
from serve.slides.tile_answers import OUTPUT, Stages, Tile, TileAnswers


def test_a_kept_answer_is_held_without_its_batch_and_until_its_last_use() -> None:
    batches = []

    class Model:
        def submit(self, tile: Any, outputs: Any) -> Future[Any]:
            batch = np.zeros((2, 1, 1, 1), np.uint8)
            batches.append(weakref.ref(batch))
            answer = Future[Any]()
            answer.set_result({OUTPUT: batch[0]})
            return answer

    use = Use(0, 0, is_kept=False, keep=True)
    tiles = (
        Tile(use, np.zeros((4, 4, 3), np.uint8)),
        Tile(Use(0, 0, is_kept=True, keep=False), None),
    )
    items = _answers(Model()).in_order(iter(tiles))
    assert next(items).use is use
    assert [batch() for batch in batches] == [None]
    kept = weakref.ref(next(items).probabilities)
    assert kept() is None


def _answers(model: Any) -> TileAnswers:
    plan = cast(Plan, None)  # it is for messages only
    return TileAnswers(plan, cast(TileRunner, model), Stages(), most_pending=2, soon_s=1)
