"""Workers that do not start, on a real Ray."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import workers.crew
from workers import RayCrew, WorkerError, spread

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_of_two_cpus")]


@pytest.fixture(autouse=True, scope="module")
def by_value(ray_of_two_cpus):
    """The workers cannot import this file."""
    # Not at the top: Ray reads when it is imported whether it is to keep to the loopback address.
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Job:
    """Loads on the first `n_sound` workers alone, and writes down each attempt."""

    def __init__(self, log: Path, n_sound: int) -> None:
        self.log, self.n_sound = log, n_sound

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__ = state
        with self.log.open("a") as log:
            log.write("start\n")
        if attempts(self.log) > self.n_sound:
            raise OSError("a library is missing on this machine")

    def __call__(self, item: int) -> int:
        time.sleep(0.1)  # long enough for starts to come in between
        return item + 1


def attempts(log: Path) -> int:
    return len(log.read_text().splitlines())


def test_where_no_worker_starts_it_is_an_error_with_the_cause(tmp_path):
    cause = "did not start: OSError: a library is missing on this machine"
    with (
        RayCrew(Job(tmp_path / "log", 0), num_cpus_per_worker=0.1, n_workers=1) as crew,
        pytest.raises(WorkerError, match=cause),
    ):
        list(spread(crew, range(3)))
    assert attempts(tmp_path / "log") == workers.crew._FAILED_STARTS


def poll_until(crew: RayCrew, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < end, "workers were not tried as often"
        crew.workers()
        time.sleep(0.05)


def test_workers_that_do_not_start_stop_no_other_and_are_not_tried_without_end(tmp_path, caplog):
    log = tmp_path / "log"

    def failed() -> list[str]:
        return [r.getMessage() for r in caplog.records if "did not start" in r.getMessage()]

    with RayCrew(Job(log, 1), num_cpus_per_worker=0.1, n_workers=1) as crew:
        poll_until(crew, lambda: bool(crew.workers()))  # else a failure before it would not count
        crew._n_workers = 2
        poll_until(crew, lambda: len(failed()) == workers.crew._FAILED_STARTS)
        done = [outcome.result for outcome in spread(crew, range(30))]
    assert sorted(done) == list(range(1, 31))
    assert attempts(log) == 1 + workers.crew._FAILED_STARTS
    assert len(failed()) == workers.crew._FAILED_STARTS
    assert failed()[-1].endswith("missing on this machine; the next try is in 60 s")


def test_after_a_while_they_are_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(workers.crew, "_PAUSE_SECONDS", 0.5)
    log = tmp_path / "log"
    with RayCrew(Job(log, 1), num_cpus_per_worker=0.1, n_workers=2) as crew:
        poll_until(crew, lambda: log.exists() and attempts(log) > 1 + workers.crew._FAILED_STARTS)


def test_what_ray_cannot_hold_is_an_error_of_this_package(tmp_path, monkeypatch):
    import ray

    def full(item):
        raise ray.exceptions.OutOfDiskError("the disk under /tmp/ray is full")

    with RayCrew(Job(tmp_path / "log", 9), num_cpus_per_worker=0.1, n_workers=1) as crew:
        monkeypatch.setattr(ray, "put", full)
        outcomes = list(spread(crew, range(3)))
    assert len(outcomes) == 3
    for outcome in outcomes:  # each for itself: there may be room for the next
        assert isinstance(outcome.error, WorkerError)
        assert "the disk under /tmp/ray is full" in str(outcome.error)
