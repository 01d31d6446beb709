import socket
import time

import pytest

pytest.importorskip("ray", reason="the extra `cluster` is not installed")

from serve.slides.cluster.head import HeadWatch
from serve.slides.errors import ClusterError


def listen(port: int = 0) -> socket.socket:
    return socket.create_server(("127.0.0.1", port))


def test_a_head_that_is_gone_too_long_is_an_error_and_told_before() -> None:
    server = listen()
    told: list[str] = []
    address = f"127.0.0.1:{server.getsockname()[1]}"
    watch = HeadWatch(address, told.append, every_s=0.02, give_up_s=0.2)
    server.accept()[0].close()  # it has looked
    assert watch.error is None
    server.close()
    watch._thread.join(30)
    assert isinstance(watch.error, ClusterError)
    assert address in str(watch.error)
    assert len(told) == 1


def test_a_head_that_comes_back_in_time_is_found_again() -> None:
    server = listen()
    port = server.getsockname()[1]
    server.close()
    told: list[str] = []
    watch = HeadWatch(f"127.0.0.1:{port}", told.append, every_s=0.02, give_up_s=60)
    while not told:
        assert watch._thread.is_alive()
        time.sleep(0.01)
    with listen(port) as again:
        again.accept()[0].close()
        while len(told) < 2:
            again.settimeout(30)
            again.accept()[0].close()
    watch.close()
    watch._thread.join(30)
    assert watch.error is None
    assert "again" in told[1]
