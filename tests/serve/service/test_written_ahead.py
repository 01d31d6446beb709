"""Answers that are written ahead of who reads them."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from serve.service.written_ahead import WrittenAhead

BLOCKS = [bytes([index]) * (10_000 * index) for index in range(1, 20)]


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


def test_the_first_block_is_read_before_the_last_is_written(executor: ThreadPoolExecutor) -> None:
    may_end = threading.Event()

    def blocks() -> Iterator[bytes]:
        yield b"first"
        assert may_end.wait(60)
        yield b"last"

    answer = iter(WrittenAhead(blocks(), executor))
    assert next(answer) == b"first"
    may_end.set()
    assert list(answer) == [b"last"]


def test_all_is_written_though_nobody_reads(executor: ThreadPoolExecutor) -> None:
    source = iter(BLOCKS)
    answer = WrittenAhead(source, executor)
    executor.submit(lambda: None).result(60)  # after the writing, which has the only thread
    assert next(source, None) is None
    assert b"".join(answer) == b"".join(BLOCKS)


def test_a_reader_who_leaves_ends_the_writing(executor: ThreadPoolExecutor) -> None:
    may_go_on = threading.Event()

    def blocks() -> Iterator[bytes]:
        yield b"first"
        assert may_go_on.wait(60)
        yield b"second"
        yield b"third, which nobody asks for"

    source = blocks()
    answer = iter(WrittenAhead(source, executor))
    assert next(answer) == b"first"
    answer.close()  # type: ignore[attr-defined]
    may_go_on.set()
    executor.submit(lambda: None).result(60)
    assert next(source) == b"third, which nobody asks for"


def test_an_error_reaches_the_reader_after_what_was_written(executor: ThreadPoolExecutor) -> None:
    def blocks() -> Iterator[bytes]:
        yield b"first"
        raise OSError("no space left on the device")

    answer = iter(WrittenAhead(blocks(), executor))
    assert next(answer) == b"first"
    with pytest.raises(OSError, match="no space"):
        next(answer)
