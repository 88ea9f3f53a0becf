"""Owns workers on a Ray cluster that each do one job on item after item. Knows no video.

They start as machines join and are forgotten as machines leave; `spread` does the rest.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

from workers.pool import resources, translated
from workers.schedule import WorkerLostError
from workers.spec import WorkerError

logger = logging.getLogger(__name__)

_FAILED_STARTS = 3
"""So many workers in a row that do not start are the end where there is no other: the next would
not either. Where there are others, no more are started for a while."""
_PAUSE_SECONDS = 60.0
_GONE_WITH_MACHINE = ("its node has died", "node was terminated", "node_death")
"""What Ray says of an actor whose machine was lost (core_worker's and gcs_server's texts)."""
# Of one whose process alone has died Ray says so within a second. Until it has found a machine to
# be gone, after some 15 s, it says ActorUnavailableError.


class RayCrew:
    """As many workers as the cluster has room for, or `n_workers` of them: a `Crew`.

    Each is a process that unpickles `job`, a callable, once and then calls it with item after item.
    With `n_workers` above what there is room for, the others are wanted from Ray, which asks its
    autoscaler for machines. Use within a ray_session.
    """

    def __init__(
        self,
        job: Callable[[Any], Any],
        *,
        num_cpus_per_worker: float = 1,
        num_gpus_per_worker: float = 0,
        n_workers: int | None = None,
    ) -> None:
        import ray
        from ray.util.metrics import Counter, Gauge

        if not ray.is_initialized():
            raise WorkerError("Ray is not running: open a ray_session before the crew")
        self._cpus, self._gpus = num_cpus_per_worker, num_gpus_per_worker
        self._n_workers = n_workers
        self._job = ray.put(job)
        # Restarted by Ray, a worker would be given what killed it again and again, uncounted.
        self._actor: Any = ray.remote(
            num_cpus=self._cpus, num_gpus=self._gpus, max_restarts=0, max_task_retries=0,
            scheduling_strategy="SPREAD",
        )(_JobWorker)  # fmt: skip
        self._starting: dict[Any, Any] = {}
        self._ready: set[Any] = set()
        self._lock = threading.Lock()  # of `_ready`, which a thread of Ray's changes
        self._failed_starts, self._no_start_before = 0, 0.0
        # On Ray's dashboard and its Prometheus port, with the prefix ray_.
        self._n_ready = Gauge("restore_workers", "Workers that are ready.")
        self._n_done = Counter("restore_parts_done", "Parts that came back restored.")
        self._n_lost = Counter("restore_workers_lost", "Workers that died, or their machines.")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def workers(self) -> Collection[Any]:
        """Those that are ready; starts more where there is room."""
        with _ray_errors():
            return self._workers()

    def _workers(self) -> Collection[Any]:
        import ray

        asked = list(self._starting)
        started = ray.wait(asked, num_returns=len(asked), timeout=0)[0] if asked else []
        for ref in started:
            actor = self._starting.pop(ref)
            try:
                ray.get(ref)
            except ray.exceptions.RayError as error:
                self._start_failed(error)
            else:
                self._failed_starts = 0
                with self._lock:
                    self._ready.add(actor)
        with self._lock:
            ready = tuple(self._ready)
        self._n_ready.set(len(ready))
        if time.monotonic() < self._no_start_before:
            return ready
        wanted = self.fits() if self._n_workers is None else self._n_workers
        for _ in range(wanted - len(ready) - len(self._starting)):
            actor = self._actor.remote(self._job)
            self._starting[actor.ready.remote()] = actor
        return ready

    def hold(self, item: Any) -> Any:
        """Put the item into the object store: every worker and every retry reads it from there."""
        import ray

        with _ray_errors():
            return ray.put(item)

    def hold_again(self, held: Any) -> Any:
        """A new object with the same content, which is on this machine alone.

        Ray 2.60 would also look for the old one on the machine that had it. Where that one is gone
        but not yet found so, the worker's next item waits 10 s, then 20 s, for an answer.
        """
        import ray

        with _ray_errors():
            return ray.put(ray.get(held))

    def start(self, worker: Any, held: Any) -> Future[Any]:
        """Queue the item at the worker."""
        ref = worker.do.remote(held)
        future: Future[Any] = Future()
        future.add_done_callback(partial(_cancelled, ref))
        ref.future().add_done_callback(partial(self._finish, worker, future))
        return future

    def dismiss(self, worker: Any) -> None:
        """Kill the worker."""
        import ray

        with self._lock:
            self._ready.discard(worker)
        ray.kill(worker)

    def close(self) -> None:
        """Kill all workers. Again does nothing."""
        import ray

        with self._lock:
            actors = [*self._ready, *self._starting.values()]
            self._ready, self._starting = set(), {}
        if ray.is_initialized():
            for actor in actors:
                ray.kill(actor)

    def _start_failed(self, error: Exception) -> None:
        """Say so; raises WorkerError where it looks as if no worker could start."""
        # Ray's text has the traceback in it; its last line says what was raised.
        text = f"a worker did not start: {str(error).strip().splitlines()[-1]}"
        self._failed_starts += 1
        if self._failed_starts < _FAILED_STARTS:
            logger.warning(text)
        elif self._ready:
            logger.warning("%s; the next try is in %g s", text, _PAUSE_SECONDS)
            self._failed_starts, self._no_start_before = 0, time.monotonic() + _PAUSE_SECONDS
        else:
            raise WorkerError(text) from error

    def room(self) -> str:
        """What a worker needs and what there is."""
        return f"each needs {self._cpus:g} CPUs and {self._gpus:g} GPUs, {resources()}"

    def fits(self) -> int:
        """Workers that fit on the machines that are there, if nothing else runs on them."""
        import ray

        total = 0
        for node in ray.nodes():  # type: ignore[no-untyped-call]
            if node["Alive"]:
                has = node["Resources"]
                fits = [has.get("CPU", 0) / self._cpus] if self._cpus else []
                fits += [has.get("GPU", 0) / self._gpus] if self._gpus else []
                total += int(min(fits, default=0))
        return total

    def _finish(self, worker: Any, future: Future[Any], done: Future[Any]) -> None:
        """Runs in a thread of Ray's."""
        import ray

        if not future.set_running_or_notify_cancel():
            return
        error = done.exception()
        # OutOfMemoryError is Ray's: it has killed the worker, as its machine ran out of memory.
        gone = (
            ray.exceptions.ActorDiedError, ray.exceptions.ActorUnavailableError,
            ray.exceptions.OutOfMemoryError,
        )  # fmt: skip
        if error is None:
            self._n_done.inc()
            future.set_result(done.result())
        elif isinstance(error, gone):
            with self._lock:
                if worker in self._ready:
                    self._ready.discard(worker)
                    self._n_lost.inc()
            text = " ".join(str(error).split())
            lost = isinstance(error, ray.exceptions.ActorUnavailableError) or any(
                words in text for words in _GONE_WITH_MACHINE
            )
            future.set_exception(WorkerLostError(text, with_its_machine=lost))
        else:
            future.set_exception(translated(error))


@contextmanager
def _ray_errors() -> Iterator[None]:
    """What Ray itself cannot do, such as hold a part where store and disk are full."""
    import ray

    try:
        yield
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise translated(error) from error


class _JobWorker:
    """The actor."""

    def __init__(self, job: Callable[[Any], Any]) -> None:
        self._job = job

    def ready(self) -> None:
        """Answers once the worker has started."""

    def do(self, item: Any) -> Any:
        return self._job(item)


def _cancelled(ref: Any, future: Future[Any]) -> None:
    import ray

    if future.cancelled():
        ray.cancel(ref)
