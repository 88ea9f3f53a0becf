"""Owns what a pool of workers is, and the one on Ray: a batch goes to the least loaded worker, and
comes back as a Future. Knows no network, no video and no order of frames; its caller bounds what is
in flight."""

import threading
from abc import ABC, abstractmethod
from concurrent.futures import Future
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Self

from workers.deadlines import (
    BATCH_TIMEOUT_SECONDS,
    Deadlines,
    allowed,
    allowed_for_warm_up,
    settle,
)
from workers.spec import PlaneSpec, TileBatch, WorkerError, WorkerSpec
from workers.worker import TileWorker


class RestorerPool(ABC):
    """Restores batches of tiles. A context manager that closes itself."""

    n_workers: int
    """How many batches are restored at the same time."""

    @abstractmethod
    def submit(
        self, tiles: TileBatch, planes: PlaneSpec | None = None, smaller: bool = False
    ) -> Future[TileBatch]:
        """Start restoring a batch: uint8 or uint16 arrays `[N, h, w]`, one per plane. Never waits.

        `planes` where they are not those of the spec: streams of any format share one pool.
        `smaller` asks for the spec's second network.
        The Future gives the same shapes and dtypes, perhaps read-only, or raises WorkerError; it
        may be cancelled. The arrays are only read, and must stay as they are until it is done.
        Raises WorkerError where the pool is closed or has no worker left.
        """

    @abstractmethod
    def warm_up(self, tiles: TileBatch, planes: PlaneSpec | None = None) -> None:
        """Have every worker restore a batch of the real shape; returns when all have done so."""

    @abstractmethod
    def close(self) -> None:
        """Stop the workers; what is not done fails or is cancelled. Again does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RayPool(RestorerPool):
    """Workers in processes of their own, on every machine of the Ray session that is open.

    A worker that dies is restarted up to 3 times in its life, and its batches are given to it
    again; one that stays dead is left out. On a GPU, `spec.device` is the worker's own first one.
    A batch fails after `batch_timeout_seconds`, more for large ones, for itself and each one that
    its worker had before.
    Raises WorkerError (WeightsError for the weights) where the workers cannot all start.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        n_workers: int,
        *,
        num_cpus_per_worker: float,
        num_gpus_per_worker: float = 0,
        start_timeout_seconds: float = 180,
        batch_timeout_seconds: float = BATCH_TIMEOUT_SECONDS,
    ) -> None:
        self.n_workers = n_workers
        self._batch_timeout_seconds = batch_timeout_seconds
        self._lock = threading.Lock()
        self._deadlines = Deadlines()
        self._loads: dict[Any, int] = {}
        self._in_flight: set[Future[TileBatch]] = set()
        actor = _actor_class(num_cpus_per_worker, num_gpus_per_worker)
        spec = _share(spec, num_cpus_per_worker, num_gpus_per_worker)
        try:
            self._loads = {actor.remote(spec): 0 for _ in range(n_workers)}
            self._await_all("ready", start_timeout_seconds)
        except BaseException:
            self.close()
            raise

    def submit(
        self, tiles: TileBatch, planes: PlaneSpec | None = None, smaller: bool = False
    ) -> Future[TileBatch]:
        worker, place = self._least_loaded()
        ref = worker.restore.remote(tiles, planes, smaller)
        future: Future[TileBatch] = Future()
        with self._lock:
            self._in_flight.add(future)
        # A worker whose machine was lost waits for another one for as long as it takes.
        self._deadlines.bound(future, allowed(tiles, self._batch_timeout_seconds), place)
        future.add_done_callback(partial(self._forget, ref))
        ref.future().add_done_callback(partial(self._finish, worker, future))
        return future

    def warm_up(self, tiles: TileBatch, planes: PlaneSpec | None = None) -> None:
        seconds = allowed_for_warm_up(tiles, self._batch_timeout_seconds)
        self._await_all("warm_up", seconds, tiles, planes)

    def close(self) -> None:
        import ray

        with self._lock:
            workers, self._loads = list(self._loads), {}
            pending = list(self._in_flight)
        if ray.is_initialized():
            for worker in workers:
                ray.kill(worker)
        for future in pending:
            settle(future, WorkerError("the pool was closed before the batch was done"))
        self._deadlines.close()

    def _await_all(self, method: str, timeout_seconds: float, *args: Any) -> None:
        import ray

        refs = [getattr(worker, method).remote(*args) for worker in self._loads]
        try:
            ray.get(refs, timeout=timeout_seconds)
        except ray.exceptions.GetTimeoutError as error:
            raise WorkerError(
                f"{self.n_workers} workers were not ready in {timeout_seconds:g} s: {resources()}"
            ) from error
        except ray.exceptions.RayError as error:
            raise translated(error) from error

    def _least_loaded(self) -> tuple[Any, int]:
        """A worker, and the place in its queue of what it is given: 1 is the next."""
        with self._lock:
            if not self._loads:
                raise WorkerError("the pool is closed, or every worker died for good")
            worker = min(self._loads, key=self._loads.__getitem__)
            self._loads[worker] += 1
            return worker, self._loads[worker]

    def _finish(self, worker: Any, future: Future[TileBatch], done: Future[TileBatch]) -> None:
        """Runs in a thread of Ray's."""
        import ray

        error = done.exception()
        with self._lock:
            if isinstance(error, ray.exceptions.ActorDiedError):
                self._loads.pop(worker, None)
            elif worker in self._loads:
                self._loads[worker] -= 1
        settle(future, done.result() if error is None else translated(error))

    def _forget(self, ref: Any, future: Future[TileBatch]) -> None:
        import ray

        with self._lock:
            self._in_flight.discard(future)
        if future.cancelled():
            ray.cancel(ref)


class _RayWorker:
    """The actor. Its network is loaded on the first call, not in the constructor: from there an
    error would come as ActorDiedError, without its type, after as many restarts as are allowed."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec

    @cached_property
    def _worker(self) -> TileWorker:
        return TileWorker(self._spec)

    def ready(self) -> None:
        assert self._worker

    def warm_up(self, tiles: TileBatch, planes: PlaneSpec | None) -> None:
        self._worker.warm_up(tiles, planes)

    def restore(self, tiles: TileBatch, planes: PlaneSpec | None, smaller: bool) -> TileBatch:
        return self._worker(tiles, planes, smaller)


def _actor_class(num_cpus: float, num_gpus: float) -> Any:
    import ray

    # Else Ray would start one by itself, with defaults that `ray_session` is there to avoid.
    if not ray.is_initialized():
        raise WorkerError("Ray is not running: open a ray_session before the pool")
    # max_task_retries is about workers that die: an error that the worker raises is not retried.
    # Without it, the batch in flight would fail with ActorUnavailableError although the worker
    # comes back (https://docs.ray.io/en/latest/ray-core/fault_tolerance/actors.html).
    return ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=3, max_task_retries=3)(
        _RayWorker
    )


def resources() -> str:
    """What the machines of the session have, and what of it is free."""
    import ray

    free = ray.available_resources()  # type: ignore[no-untyped-call]
    total = ray.cluster_resources()  # type: ignore[no-untyped-call]
    counts = (f"{free.get(kind, 0):g} of {total.get(kind, 0):g} {kind}s" for kind in ("CPU", "GPU"))
    return f"{' and '.join(counts)} in the cluster are free"


def _share(spec: WorkerSpec, num_cpus: float, num_gpus: float) -> WorkerSpec:
    if spec.device.startswith("cuda") and not num_gpus:
        raise ValueError(f"workers on {spec.device} need num_gpus_per_worker above 0")
    # Ray shows a worker only the GPUs that it gave it, counted from 0.
    device = "cuda:0" if num_gpus else spec.device
    return replace(spec, device=device, threads=spec.threads or max(1, int(num_cpus)))


def translated(error: BaseException) -> WorkerError:
    """Ray's errors, and any other, as the one that this package raises."""
    cause = getattr(error, "cause", None) or error  # RayTaskError has what was raised in the worker
    if isinstance(cause, WorkerError):
        return cause
    text = WorkerError(f"{type(cause).__name__}: {' '.join(str(cause).split())}")
    text.__cause__ = error
    return text
