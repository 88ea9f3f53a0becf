"""Fixtures that several test files share."""

import importlib.util
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    # Triton decides when it is first imported whether its own functions are interpreted, and
    # torch.utils.flop_counter imports it: here, before any test file does. Kernels look again when
    # they are defined and run, so that the switch is not left on.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import triton.language  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests measure is not kept where the user's own is; Ray's workers see it too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def gpu() -> None:
    """Skips without a GPU; fails where there must be one."""
    if not torch.cuda.is_available():
        assert os.environ.get("REQUIRE_GPU") != "1", "REQUIRE_GPU=1, and there is none"
        pytest.skip("no GPU")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A weights file of a tiny network with random weights, which changes every pixel.

    Without the scan: its compiled kernel is not the same to the last bit in every process.
    """
    import mtair
    from mtair.checkpoint import save

    torch.manual_seed(0)
    dims = mtair.Dimensions(
        widths=(8, 8, 16, 16),
        depths=(1, 1, 1, 1),
        refinement=1,
        heads=(1, 1, 2, 2),
        ffn_expansion=2.0,
        prompt_dims=(8, 8, 8, 8),
        prompt_sizes=(8, 8, 4, 4),
        mamba_stages=(),
    )
    path: Path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save(mtair.MTAIR(dims), path, {})
    return str(path)


@pytest.fixture(scope="session")
def ray_of_two_cpus() -> Iterator[None]:
    """A Ray for the whole run. Its ports are on the loopback address, its token is its own."""
    from workers import ray_session

    with ray_session(num_cpus=2):
        yield


@pytest.fixture
def rtsp_server() -> Iterator[object]:
    """An RTSP server of its own for a test, which may freeze and kill it."""
    from streams import RtspServer

    with RtspServer() as server:
        yield server


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread for torch: more slow maps of a test's size, a hundredfold on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """What a command run in this process makes of the log is undone after the test."""
    loggers = [logging.getLogger(name) for name in ("pipeline", "workers")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
