"""Owns the start of `mtair`'s training on a Ray: one process per GPU, joined as by torchrun.
Knows no loop and no loss.

    python -m workers.training --config configs/train/small.yaml --data DATA --out RUN
        [--address ADDRESS] [--processes N] [--init WEIGHTS]

Here and not behind `mtair train`, because `mtair` knows no Ray. Plain actors instead of Ray Train,
which adds pandas, pyarrow and a second way to write checkpoints to what a run already does itself.
DATA and RUN must be the same folders on every node; a stopped run is resumed by the same command.
"""

import argparse
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

from mtair.schedule import TrainConfig
from workers.cluster import ray_session
from workers.pool import resources
from workers.spec import WorkerError

START_SECONDS = 180.0
"""A cluster that grows adds a machine in less."""


class _Process:
    """The actor: one process of the run."""

    def meeting_point(self) -> tuple[str, int]:
        """This node's address, and a port that is free there now."""
        import ray

        with socket.socket() as listener:
            listener.bind(("", 0))
            port: int = listener.getsockname()[1]
        return str(ray.util.get_node_ip_address()), port  # type: ignore[no-untyped-call]

    def train(
        self, rank: int, count: int, meeting: tuple[str, int], options: dict[str, Any]
    ) -> str:
        from mtair.train import train

        address, port = meeting
        # Ray shows an actor its own GPU alone, as number 0.
        os.environ |= {
            "RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": "0",
            "MASTER_ADDR": address, "MASTER_PORT": str(port),
        }  # fmt: skip
        if address == "127.0.0.1":  # a Ray that is private to this machine: so is gloo
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        return str(train(**options))


def train_on_ray(
    config: TrainConfig, data: Path, folder: Path, *, processes: int | None = None,
    init: str | None = None,
) -> Path:  # fmt: skip
    """Train in `processes` actors, by default one per GPU of the Ray joined; the weights' path.

    One that fails ends the run: the others would wait for it. Raises WorkerError.
    """
    import ray

    n_gpus = int(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]
    count = processes or n_gpus
    if not count:
        raise WorkerError("there is no GPU in this Ray: say how many processes, on CPUs")
    config = replace(config, model=str(Path(config.model).resolve()))
    options = {
        "config": config, "data_root": data.resolve(), "folder": folder.resolve(), "init": init,
    }  # fmt: skip
    # Ray's types know the methods of a decorated class alone.
    actor: Any = ray.remote(num_cpus=1, num_gpus=1 if n_gpus else 0)(_Process)
    actors = [actor.remote() for _ in range(count)]
    try:
        meeting = _started(actors)
        waiting = [a.train.remote(n, count, meeting, options) for n, a in enumerate(actors)]
        paths = []
        while waiting:
            done, waiting = ray.wait(waiting)
            paths += ray.get(done)
        return Path(paths[0])
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        raise WorkerError(f"training failed: {str(cause).strip().splitlines()[0]}") from error
    finally:
        for one in actors:
            ray.kill(one)


def _started(actors: list[Any]) -> tuple[str, int]:
    """Where they meet, once all of them run: one that has no place would be waited for."""
    import ray

    asked = [actor.meeting_point.remote() for actor in actors]
    _, waiting = ray.wait(asked, num_returns=len(asked), timeout=START_SECONDS)
    if waiting:
        raise WorkerError(
            f"{len(waiting)} of {len(asked)} processes were not started in {START_SECONDS:g} s: "
            f"{resources()}"
        )
    meeting: tuple[str, int] = ray.get(asked[0])
    return meeting


def main() -> None:
    """Entry point of `python -m workers.training`."""
    parser = argparse.ArgumentParser(description="Train MTAIR on a Ray.")
    for name in ("--config", "--data", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--address", help="of a Ray cluster; else a private one on this machine")
    parser.add_argument("--processes", type=int, help="default: one per GPU")
    parser.add_argument("--init", help="weights to start a new run from")
    args = parser.parse_args()
    try:
        config = TrainConfig.load(args.config)
        with ray_session(args.address):
            path = train_on_ray(
                config, args.data, args.out, processes=args.processes, init=args.init
            )
    except (WorkerError, OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    parser.exit(0, f"{path}\n")


if __name__ == "__main__":
    main()
