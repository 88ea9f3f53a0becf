"""Workers that do not start or are lost, and what each is given, on a real Ray."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import ONE_THREAD

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


LOST = """
import time
from workers import Limits, RayCrew, cluster, spread
cluster._stay_private()
import ray
from ray.cluster_utils import Cluster as Machines
small = {"object_store_memory": 200 << 20}
machines = Machines(initialize_head=True, head_node_args={"num_cpus": 0, **small})
first, second = (machines.add_node(num_cpus=1, **small) for _ in range(2))
ray.init(address=machines.address, log_to_driver=False)
def job(item):
    time.sleep(0.5)
    return ray.get_runtime_context().get_node_id(), time.time()
done, died = [], 0
with RayCrew(job) as crew:
    while len(crew.workers()) < 2:
        time.sleep(0.1)
    for outcome in spread(crew, (bytes(2_500_000) for _ in range(12)), Limits(tries=1)):
        assert outcome.error is None, outcome.error
        done.append(outcome.result)
        if len(done) == 4:
            machines.remove_node(first, allow_graceful=False)
            died = time.time()
assert first.node_id in {node for node, _ in done}
print("after", max(ended for _, ended in done) - died)
ray.shutdown()
machines.shutdown()
"""


@pytest.mark.ray
@pytest.mark.timeout(200)
@pytest.mark.usefixtures("one_thread")
def test_a_lost_machine_is_made_up_for_before_ray_has_found_it_lost():
    done = subprocess.run(
        [sys.executable, "-c", LOST], capture_output=True, text=True, check=False, timeout=180,
        env=ONE_THREAD,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [x for x in done.stdout.splitlines() if x.startswith("after ")]
    assert float(line.split()[1]) < 12  # 8 items of 0.5 s, some of the machine's; Ray takes 15 s


SHARED_GPUS = """
import os, sys
from workers import RayCrew, ray_session, spread
share, n_gpus = float(sys.argv[1]), int(sys.argv[2])
def job(item):
    import time
    time.sleep(0.2)
    return os.getpid(), os.environ["CUDA_VISIBLE_DEVICES"]
with ray_session(num_cpus=8, num_gpus=n_gpus), RayCrew(job, num_gpus_per_worker=share) as crew:
    while len(crew.workers()) < n_gpus / share:
        pass
    found = {outcome.result for outcome in spread(crew, range(40))}
print("found", sorted(gpu for _, gpu in found))
"""


@pytest.mark.ray
@pytest.mark.timeout(200)
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("share", "n_gpus", "seen"), [(1, 2, list("01")), (0.5, 2, list("0011"))])
def test_each_worker_is_given_its_gpu_or_its_share_of_one(share, n_gpus, seen):
    done = subprocess.run(
        [sys.executable, "-c", SHARED_GPUS, str(share), str(n_gpus)], capture_output=True,
        text=True, check=False, timeout=120, env=ONE_THREAD,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"found {seen}" in done.stdout


SMALL_STORE = """
from workers import RayCrew, cluster, ray_session, spread
cluster._OBJECT_STORE_BYTES = 80 << 20
def job(data):
    return data[:-1]
with ray_session(num_cpus=2), RayCrew(job) as crew:
    items = (bytes([n]) * (30 << 20) for n in range(10))
    for outcome in spread(crew, items):
        assert outcome.error is None, outcome.error
        assert outcome.result == bytes([outcome.number]) * ((30 << 20) - 1)
print("all of them")
"""


@pytest.mark.ray
@pytest.mark.timeout(200)
@pytest.mark.usefixtures("one_thread")
def test_an_object_store_that_is_full_loses_nothing():
    done = subprocess.run(
        [sys.executable, "-c", SMALL_STORE], capture_output=True, text=True, check=False,
        timeout=180, env=ONE_THREAD,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all of them" in done.stdout
