"""Batches, and the jobs of workers that are slow, die, hang or fail."""

import os
import sys
import time

import psutil

from pipeline.batch import restore_batch
from pipeline.inputs import list_inputs
from pipeline.part_job import PartJob


def batch(inputs, folder, settings, **more):
    items = list_inputs(inputs if isinstance(inputs, list) else [inputs], folder, settings, None)
    return restore_batch(items, folder, **more)


def by_name(report):
    return {file.source.name: file for file in report.files}


class SlowJob(PartJob):
    """Leaves time to be hit; says which process it is."""

    def __call__(self, part):
        time.sleep(0.4)
        return super().__call__(part)


class DyingJob(PartJob):
    """Its process dies of the fourth segment, wherever that is tried."""

    def __call__(self, part):
        if part.piece.span.index == 3:
            os._exit(1)
        return super().__call__(part)


class StragglingJob(PartJob):
    """Whoever gets the seventh segment first hangs at it."""

    seconds = 60

    def with_weights(self, weights, device, threads):
        self.__init__(weights, device, threads)
        return self

    def __call__(self, part):
        if part.piece.span.index == 7:
            with self.log.open("a") as log:
                log.write("x")
            if len(self.log.read_text()) == 1:
                time.sleep(self.seconds)
        return super().__call__(part)


class FailingJob(PartJob):
    """A bug that shows once in each process."""

    seen = False

    def __call__(self, part):
        if part.piece.span.index == 2 and not FailingJob.seen:
            FailingJob.seen = True
            raise ZeroDivisionError("once")
        return super().__call__(part)


def actors():
    return [p for p in psutil.Process().children(recursive=True) if is_actor(p)]


def is_actor(process):
    try:
        return process.cmdline()[0].startswith("ray::_JobWorker")
    except (psutil.Error, IndexError):
        return False


def batch_command(source, folder, settings, *more):
    config = folder.with_name("small.yaml")
    config.write_text("segment: {frames: 10}\nencode: {preset: ultrafast}\n")
    return [
        sys.executable, "-c", "from pipeline.cli_batch import main; main()", str(source),
        "-o", str(folder), "--config", str(config), "--model", settings["model.model"],
        "--strength", "0.5", *more,
    ]  # fmt: skip
