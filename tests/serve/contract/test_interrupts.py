import signal
import threading
from collections.abc import Iterator

import pytest

from serve.contract import interrupts
from serve.contract.interrupts import ending_signals, signals_wake_main_thread
from tests.support.interrupts import wait_while_interrupted


class Stop(Exception):
    pass


@pytest.fixture
def _sigterm_stops() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Stop

    before = signal.signal(signal.SIGTERM, stop)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Stop)]
)
@pytest.mark.usefixtures("_sigterm_stops")
def test_a_signal_that_another_thread_receives_ends_the_wait_every_time(
    number: int, raised: type[BaseException]
) -> None:
    with signals_wake_main_thread():
        for _ in range(2):
            with pytest.raises(raised):
                wait_while_interrupted(number)


def test_the_main_thread_is_woken_until_it_has_run_the_handlers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost = [signal.SIGURG] * 2
    send = signal.pthread_kill

    def lose_two(thread: int, number: int) -> None:
        if lost:
            assert lost.pop() == number
        else:
            send(thread, number)

    monkeypatch.setattr(interrupts.signal, "pthread_kill", lose_two)
    with signals_wake_main_thread(), pytest.raises(KeyboardInterrupt):
        wait_while_interrupted()
    assert not lost


def test_everything_is_as_before_after_it() -> None:
    threads, urgent = threading.active_count(), signal.getsignal(signal.SIGURG)
    with signals_wake_main_thread():
        assert threading.active_count() == threads + 1
    assert threading.active_count() == threads
    assert signal.getsignal(signal.SIGURG) == urgent
    assert signal.set_wakeup_fd(-1) == -1


def test_a_system_without_the_signal_runs_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(interrupts.signal, "SIGURG")
    threads = threading.active_count()
    with signals_wake_main_thread():
        assert threading.active_count() == threads


def test_it_does_nothing_in_another_thread() -> None:
    seen: list[object] = []

    def look() -> None:
        with signals_wake_main_thread():
            seen.append(signal.getsignal(signal.SIGURG))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGURG)]


@pytest.mark.usefixtures("_terminal")
def test_a_closed_terminal_ends_a_command_unless_that_is_to_outlive_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert ending_signals() == (signal.SIGTERM, signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    assert ending_signals() == (signal.SIGTERM,)
    monkeypatch.delattr(interrupts.signal, "SIGHUP")  # as on Windows
    assert ending_signals() == (signal.SIGTERM,)
