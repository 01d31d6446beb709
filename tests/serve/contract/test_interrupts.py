import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from types import FrameType, SimpleNamespace

import pytest

from serve.contract import interrupts
from serve.contract.interrupts import ending_signals, outside_locks, safe_interrupts
from tests.support.interrupts import (
    DEADLINE_S,
    deaf_main_thread,
    send_from_here,
    wait_while_interrupted,
)


class Stop(Exception):
    pass


ENDING = pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Stop)]
)


@pytest.fixture
def _sigterm_stops() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Stop

    before = signal.signal(signal.SIGTERM, stop)
    yield
    signal.signal(signal.SIGTERM, before)


@ENDING
@pytest.mark.usefixtures("_sigterm_stops")
def test_a_signal_that_another_thread_receives_ends_the_wait_every_time(
    number: int, raised: type[BaseException]
) -> None:
    with safe_interrupts():
        for _ in range(2):
            with pytest.raises(raised):
                wait_while_interrupted(number)


class _Interrupted(threading.Condition):
    """A condition whose `with` takes the lock, and receives a signal before it can say so."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.lock = self._lock  # type: ignore[attr-defined]
        self.lock.acquire()
        # Written in C, as the lock's own are: the handler finds the main thread in Condition's.
        self._lock = SimpleNamespace(
            __enter__=partial(signal.raise_signal, number), __exit__=self.lock.__exit__
        )

    def is_free(self) -> bool:
        """Whether another thread can take the lock."""
        taken: list[bool] = []
        thread = threading.Thread(target=lambda: taken.append(self.lock.acquire(blocking=False)))
        thread.start()
        thread.join()
        return taken == [True]


def _enter(condition: threading.Condition) -> None:
    """Take the lock, free it, and wait."""
    with condition:
        pass
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        time.sleep(0.001)


@ENDING
@pytest.mark.usefixtures("_sigterm_stops")
def test_a_signal_that_comes_when_a_lock_was_just_taken_leaves_it_free(
    number: int, raised: type[BaseException]
) -> None:
    with safe_interrupts():
        for _ in range(2):
            condition = _Interrupted(number)
            with pytest.raises(raised):
                _enter(condition)
            assert condition.is_free()


def test_a_signal_that_comes_when_a_wait_has_just_freed_its_lock_comes_after_it() -> None:
    condition = threading.Condition()
    condition._release_save = partial(signal.raise_signal, signal.SIGINT)  # type: ignore[attr-defined]
    condition._acquire_restore = id  # type: ignore[attr-defined]
    waited: list[bool] = []
    with pytest.raises(KeyboardInterrupt), safe_interrupts(), condition:
        waited.append(condition.wait(0))
    assert waited == [False]


class _Traced:
    """A lock that notes which frames of its condition call it."""

    def __init__(self) -> None:
        self.frames: dict[str, FrameType] = {}

    def acquire(self, blocking: bool = True) -> bool:
        self._note(sys._getframe(1))
        return blocking  # False: who asks has it

    def release(self) -> None:
        self._note(sys._getframe(1))

    def __enter__(self) -> None:
        self._note(sys._getframe(1))

    def __exit__(self, *_: object) -> None:
        self._note(sys._getframe(1))

    def _note(self, frame: FrameType) -> None:
        self.frames[frame.f_code.co_name] = frame


@pytest.mark.parametrize("name", ["__enter__", "__exit__", "_release_save", "_acquire_restore"])
def test_no_place_that_takes_or_frees_a_lock_is_left_by_a_signal(name: str) -> None:
    lock, seen = _Traced(), list[int]()
    condition = threading.Condition(lock)  # type: ignore[arg-type]
    with condition:
        condition.wait(0)
    handle = outside_locks(lambda number, _: seen.append(number))
    before = signal.signal(signal.SIGUSR1, handle)
    with safe_interrupts():
        handle(signal.SIGUSR1, lock.frames[name])
        assert not seen
    assert seen == [signal.SIGUSR1]  # it is not lost
    signal.signal(signal.SIGUSR1, before)


def test_a_handler_that_is_set_within_the_block_leaves_locks_free_too() -> None:
    def handle(*_: object) -> None:
        raise Stop

    condition = _Interrupted(signal.SIGINT)
    with safe_interrupts():
        before = signal.signal(signal.SIGINT, outside_locks(handle))
        try:
            with pytest.raises(Stop):
                _enter(condition)
        finally:
            signal.signal(signal.SIGINT, before)
    assert condition.is_free()


def test_what_is_held_back_when_a_postponed_signal_is_due_gets_it() -> None:
    held: list[int] = []
    with safe_interrupts():
        with _Interrupted(signal.SIGINT):
            before = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
        deadline = time.monotonic() + DEADLINE_S
        while not held:
            assert time.monotonic() < deadline
        signal.signal(signal.SIGINT, before)
    assert held == [signal.SIGINT]


def test_a_postponed_signal_is_not_lost_where_the_block_ends() -> None:
    before = signal.getsignal(signal.SIGINT)
    condition = _Interrupted(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), safe_interrupts(), condition:
        pass
    assert condition.is_free()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_fork_which_nothing_would_wake_postpones_nothing() -> None:
    with safe_interrupts():
        child = os.fork()
        if not child:
            try:
                with _Interrupted(signal.SIGINT):
                    os._exit(1)
            except KeyboardInterrupt:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_wait_for_the_lock_of_a_condition_ends() -> None:
    lock = threading.Lock()
    lock.acquire()
    rescue = threading.Timer(DEADLINE_S, lock.release)
    rescue.start()
    interrupt = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))

    def enter() -> None:
        interrupt.start()
        _enter(threading.Condition(lock))

    with safe_interrupts(), pytest.raises(KeyboardInterrupt):
        enter()
    rescue.cancel()
    assert lock.locked()  # another thread's


def test_a_wait_in_the_standard_library_ends() -> None:
    waiting: queue.Queue[None] = queue.Queue()
    rescue = threading.Timer(DEADLINE_S, waiting.put, (None,))
    rescue.start()
    with safe_interrupts(), deaf_main_thread():
        sender = threading.Thread(target=send_from_here)
        sender.start()
        with pytest.raises(KeyboardInterrupt):
            waiting.get()
        sender.join()
    rescue.cancel()
    assert not waiting.mutex.locked()


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
    with safe_interrupts(), pytest.raises(KeyboardInterrupt):
        wait_while_interrupted()
    assert not lost


def test_everything_is_as_before_after_it() -> None:
    threads, urgent = set(threading.enumerate()), signal.getsignal(signal.SIGURG)
    with safe_interrupts():
        assert len(set(threading.enumerate()) - threads) == 1
    assert set(threading.enumerate()) <= threads  # those of earlier tests may still end
    assert signal.getsignal(signal.SIGURG) == urgent
    assert signal.set_wakeup_fd(-1) == -1


def test_a_system_without_the_signal_runs_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(interrupts.signal, "SIGURG")
    threads = set(threading.enumerate())
    with safe_interrupts():
        assert set(threading.enumerate()) <= threads


def test_it_does_nothing_in_another_thread() -> None:
    seen: list[object] = []

    def look() -> None:
        with safe_interrupts():
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
