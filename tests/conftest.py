"""Fixtures that several test files share."""

import importlib.util
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# What these modules assert is explained as it is in test files.
pytest.register_assert_rewrite(
    "sample_clips",
    "commands",
    "readback",
    "resumable",
    "streams",
    "tiles_of_noise",
    "training_data",
)

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


@pytest.fixture
def batch_settings(tiny_checkpoint: str) -> dict[str, object]:
    """Small segments, a tiny network."""
    return {
        "model.model": tiny_checkpoint, "model.strength": 0.5, "segment.frames": 10,
        "encode.preset": "ultrafast",
    }  # fmt: skip


@pytest.fixture
def batch_source(tmp_path: Path) -> Path:
    """A clip of nine segments, alone in its folder."""
    from media import make_clip
    from sample_clips import SHORT_GOPS

    (tmp_path / "in").mkdir()
    return make_clip(tmp_path / "in" / "a.mkv", n_frames=90, options=SHORT_GOPS, audio="aac")


@pytest.fixture
def alone(tmp_path: Path, batch_source: Path, batch_settings: dict[str, object]) -> str:
    """What restore-video makes of the source in one go."""
    from commands import sha256

    from pipeline import RestoreConfig, restore_file

    config = RestoreConfig.load(overrides=batch_settings | {"pool.kind": "local"})
    restore_file(batch_source, tmp_path / "alone.mkv", config)
    return sha256(tmp_path / "alone.mkv")


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A client of its own kind, with an empty bucket `videos`, and one `closed`."""
    import boto3
    import requests

    for name, value in {
        "AWS_ENDPOINT_URL": s3_server, "AWS_ACCESS_KEY_ID": "one", "AWS_SECRET_ACCESS_KEY": "two",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    _forget_login()
    client = boto3.client("s3")
    for name in ("videos", "closed"):
        client.create_bucket(Bucket=name)
    yield client
    client.close()
    requests.post(f"{s3_server}/moto-api/reset", timeout=10)
    _forget_login()


def _forget_login() -> None:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def a_login_for_videos_alone(
    s3: object, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Switches to a user who may not see the bucket `closed`."""
    import boto3
    import requests

    iam = boto3.client("iam")
    iam.create_user(UserName="reader")
    allowed = {"Effect": "Allow", "Action": "s3:*",
               "Resource": ["arn:aws:s3:::videos*", "arn:aws:s3:::nowhere*"]}  # fmt: skip
    iam.put_user_policy(
        UserName="reader", PolicyName="videos",
        PolicyDocument=json.dumps({"Version": "2012-10-17", "Statement": [allowed]}),
    )  # fmt: skip
    key = iam.create_access_key(UserName="reader")["AccessKey"]
    requests.post(f"{s3_server}/moto-api/reset-auth", data=b"0", timeout=10)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        patch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        _forget_login()
        yield
    requests.post(f"{s3_server}/moto-api/reset-auth", data=b"inf", timeout=10)
    iam.close()
