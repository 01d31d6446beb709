import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.client.whole_files import write_together
from serve.contract.errors import message_of


def full(number: int) -> Iterator[bytes]:
    yield b"some"
    raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_takes_no_more_is_named_and_keeps_what_was_there(
    tmp_path: Path, number: int
) -> None:
    (tmp_path / "first").write_bytes(b"before")
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        write_together(tmp_path, {"first": b"new", "second": full(number)})
    assert caught.value.errno == number
    message = message_of(caught.value)
    assert message.startswith(f"{tmp_path} cannot be used: {os.strerror(number)}")
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
    assert (tmp_path / "first").read_bytes() == b"before"
