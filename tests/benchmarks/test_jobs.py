from dataclasses import dataclass, field

from benchmarks.jobs import Jobs, Row


@dataclass
class FakeWorker:
    exitcode: int | None = None
    was_killed: bool = False

    def kill(self) -> None:
        self.was_killed, self.exitcode = True, -9


@dataclass
class FakeMachine:
    workers: dict[Row, FakeWorker] = field(default_factory=dict)

    def start(self, row: Row, *given: object) -> FakeWorker:
        self.workers[row] = FakeWorker()
        return self.workers[row]


ROWS: tuple[Row, ...] = (("mad", 0), ("dino", 0), ("mad", 1))


def _started() -> tuple[Jobs, FakeMachine]:
    machine = FakeMachine()
    jobs = Jobs(2, machine.start)
    for row in ROWS:
        jobs.add(row)
    assert jobs.step() == []
    return jobs, machine


def test_no_more_rows_run_at_a_time_than_there_is_room_for():
    jobs, machine = _started()
    assert list(machine.workers) == list(ROWS[:2])
    machine.workers[ROWS[1]].exitcode = 0
    assert jobs.step() == [ROWS[1]]
    assert list(machine.workers) == list(ROWS)
    assert not jobs.are_done


def test_a_row_that_fails_is_left_out_and_the_others_go_on():
    jobs, machine = _started()
    machine.workers[ROWS[0]].exitcode = 1
    assert jobs.step() == []
    machine.workers[ROWS[1]].exitcode = machine.workers[ROWS[2]].exitcode = 0
    assert jobs.step() == [ROWS[1], ROWS[2]]
    assert jobs.are_done
    assert set(jobs.seconds) == {ROWS[1], ROWS[2]}


def test_giving_up_ends_what_runs_and_starts_nothing_more():
    jobs, machine = _started()
    jobs.give_up()
    assert jobs.step() == []
    assert jobs.are_done
    assert all(worker.was_killed for worker in machine.workers.values())
    assert ROWS[2] not in machine.workers
