import socket
import time

import pytest

from serve.contract.errors import SettingsError
from serve.settings import InferenceSettings
from serve.slides.options import ClusterOptions

pytest.importorskip("ray", reason="the extra `cluster` is not installed")

from serve.slides.cluster.connect import Crew, HeadWatch, Room, connect, size_crew
from serve.slides.errors import ClusterError
from tests.support.errors import raises
from tests.support.ports import free_port

HEAD, GPUS, CPUS = Room(0, 0), Room(64, 8), Room(16, 0)


def size(machines: list[Room], provider: str = "auto", **options: object) -> Crew:
    settings = InferenceSettings.model_validate({"provider": provider})
    return size_crew(machines, ClusterOptions.model_validate(options), settings)


@pytest.mark.parametrize(
    ("machines", "options", "expected"),
    [
        ([HEAD, CPUS, CPUS], {}, Crew(2, 16, 0)),
        ([HEAD, CPUS, CPUS], {"worker_cpus": 4}, Crew(8, 4, 0)),
        ([HEAD, CPUS, CPUS], {"workers": 4}, Crew(4, 8, 0)),
        ([CPUS, Room(8, 0)], {}, Crew(3, 8, 0)),
        ([HEAD, GPUS, GPUS, CPUS], {}, Crew(16, 8, 1)),
        ([HEAD, GPUS], {"worker_gpus": 0.5}, Crew(16, 4, 0.5)),
        ([HEAD, GPUS], {"worker_gpus": 0}, Crew(1, 64, 0)),
        ([HEAD, GPUS], {"provider": "cpu"}, Crew(1, 64, 0)),
        ([HEAD], {"workers": 5, "worker_cpus": 8, "worker_gpus": 1}, Crew(5, 8, 1)),
    ],
)
def test_the_crew_fills_the_machines(
    machines: list[Room], options: dict[str, object], expected: Crew
) -> None:
    provider = str(options.pop("provider", "auto"))
    assert size(machines, provider, **options) == expected


@pytest.mark.parametrize("options", [{"worker_cpus": 32}, {"worker_gpus": 1}])
def test_a_cluster_without_room_is_told(options: dict[str, object]) -> None:
    with raises(ClusterError, "16 CPUs and 0 GPUs") as caught:
        size([HEAD, CPUS], **options)
    assert caught.value.code == "cluster_unusable"


@pytest.mark.parametrize("by_variable", [False, True])
def test_a_cluster_that_is_not_there_is_told_at_once(
    by_variable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"127.0.0.1:{free_port()}"
    if by_variable:
        monkeypatch.setenv("RAY_ADDRESS", address)
    with raises(ClusterError, "ray start") as caught:
        connect("auto" if by_variable else address)
    assert caught.value.code == "cluster_unusable"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["head", "ray://head:10001", "head:port", "a b:1"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with raises(SettingsError, "--cluster", address):
        ClusterOptions(cluster=address)


def listen(port: int) -> socket.socket:
    return socket.create_server(("127.0.0.1", port))


def test_a_head_that_is_gone_too_long_is_an_error_and_told_before() -> None:
    port = free_port()
    server = listen(port)
    told: list[str] = []
    address = f"127.0.0.1:{port}"
    watch = HeadWatch(address, told.append, every_s=0.02, give_up_s=0.2)
    server.accept()[0].close()  # it has looked
    assert watch.error is None
    server.close()
    watch._thread.join(60)
    assert isinstance(watch.error, ClusterError)
    assert address in str(watch.error)
    assert len(told) == 1


def test_a_head_that_comes_back_in_time_is_found_again() -> None:
    port = free_port()
    told: list[str] = []
    watch = HeadWatch(f"127.0.0.1:{port}", told.append, every_s=0.02, give_up_s=600)
    while not told:
        assert watch._thread.is_alive()
        time.sleep(0.01)
    with listen(port) as again:
        again.accept()[0].close()
        while len(told) < 2:
            again.settimeout(60)
            again.accept()[0].close()
    watch.close()
    watch._thread.join(60)
    assert watch.error is None
    assert "again" in told[1]
