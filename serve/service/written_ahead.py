"""Writes an answer to a temporary file ahead of a client that reads slowly.

What the answer is written from, such as the outlines of a large image, is freed as soon as it is
written, however slowly the client reads.
"""

import os
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Executor

_BLOCK_BYTES = 2**16
_PATIENCE_S = 60.0
"""Seconds without any new block after which the reader gives up."""


class WrittenAhead:
    """Blocks that one thread writes while another one reads them. Iterate over it once.

    Args:
        blocks: written in the order in which they come.
        executor: runs the thread that writes.
    """

    def __init__(self, blocks: Iterator[bytes], executor: Executor) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by the last of both threads
        self._changed = threading.Condition()
        self._num_bytes = 0
        self._is_over = self._is_left = False
        self._error: Exception | None = None
        executor.submit(self._write, blocks)

    def __iter__(self) -> Iterator[bytes]:
        """Yield the blocks as soon as they are written.

        Raises:
            Exception: what writing them raised, after those before.
        """
        read = 0
        try:
            while self._wait_beyond(read):
                block = os.pread(self._file.fileno(), _BLOCK_BYTES, read)
                read += len(block)
                yield block
            if self._error is not None:
                raise self._error
        finally:
            with self._changed:
                self._is_left = True
                if self._is_over:
                    self._file.close()

    def _wait_beyond(self, read: int) -> bool:
        """Wait until there is more to read; False if nothing more will come."""
        with self._changed:
            is_there = self._changed.wait_for(
                lambda: self._num_bytes > read or self._is_over, _PATIENCE_S
            )
            if not is_there:
                raise TimeoutError(f"no more of the answer was written for {_PATIENCE_S:g} s")
            return self._num_bytes > read

    def _write(self, blocks: Iterator[bytes]) -> None:
        try:
            for block in blocks:
                if self._is_left:
                    break
                os.pwrite(self._file.fileno(), block, self._num_bytes)
                with self._changed:
                    self._num_bytes += len(block)
                    self._changed.notify_all()
        except Exception as error:  # of any kind: the reader raises it
            self._error = error
        finally:
            with self._changed:
                self._is_over = True
                if self._is_left:
                    self._file.close()
                self._changed.notify_all()
