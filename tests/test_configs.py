"""Every shipped YAML of the network and of its training is one that the code accepts."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from mtair import Dimensions
from mtair.train import TrainConfig

ROOT = Path(__file__).parents[1]


def shipped(folder):
    return sorted((ROOT / "configs" / folder).glob("*.yaml"))


@pytest.mark.parametrize("folder", ["models", "train"])
def test_the_folder_is_not_empty_and_holds_yaml_alone(folder):
    files = sorted((ROOT / "configs" / folder).iterdir())
    assert files
    assert files == shipped(folder)


@pytest.mark.parametrize("path", shipped("models"), ids=lambda p: p.stem)
def test_a_model_config_builds_dimensions(path):
    values = yaml.safe_load(path.read_text())
    given = Dimensions.from_dict(values).to_dict()
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}.items() <= (
        given.items()
    )


@pytest.mark.parametrize("path", shipped("train"), ids=lambda p: p.stem)
def test_a_training_config_loads_and_names_a_model_that_ships(path):
    config = TrainConfig.load(path)
    assert ROOT / config.model in shipped("models")
    assert config.steps > config.warmup_steps
    dims = Dimensions.from_dict(yaml.safe_load((ROOT / config.model).read_text()))
    sides = {patch for _, patch, _ in config.stages}
    assert all(side % (8 * dims.stem) == 0 for side in sides)


# clusters

CLUSTER = ROOT / "configs/cluster"


def test_the_launchers_config_is_one_that_ray_accepts():
    from workers import cluster

    cluster._stay_private()  # read when ray is imported: the tests' own Ray may come later
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
    validate_config(prepare_config(config))
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert "--dashboard-host=127.0.0.1" in " ".join(starts)
    assert "RAY_AUTH_MODE=token" in " ".join(config["setup_commands"])


def test_the_jobs_manifest_starts_what_is_tested_here_with_a_token():
    from pipeline.cli_batch import app

    spec = yaml.safe_load((CLUSTER / "rayjob.yaml").read_text())["spec"]
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    pins = dict(x.split("==") for x in (ROOT / "constraints.txt").read_text().split() if "==" in x)
    assert cluster["rayVersion"] == pins["ray"]
    program, *arguments = spec["entrypoint"].split()
    assert program == "restore-batch"
    typer.main.get_command(app).make_context(program, arguments)


def test_the_jobs_manifest_has_no_field_that_kuberay_does_not_have():
    # Their Go types, rayjob_types.go and raycluster_types.go; the API server drops what it does not
    # know. The CRD's schema itself is in no package.
    job = yaml.safe_load((CLUSTER / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert set(spec) <= {
        "entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished",
        "rayClusterSpec", "submissionMode", "activeDeadlineSeconds", "runtimeEnvYAML",
    }  # fmt: skip
    cluster = spec["rayClusterSpec"]
    assert set(cluster) <= {
        "rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions",
        "headGroupSpec", "workerGroupSpecs",
    }  # fmt: skip
    assert set(cluster["autoscalerOptions"]) <= {"upscalingMode", "idleTimeoutSeconds"}
    assert cluster["autoscalerOptions"]["upscalingMode"] in {"Default", "Conservative"}
    head, (group,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert set(head) == {"rayStartParams", "template"}
    assert set(group) == {*head, "groupName", "replicas", "minReplicas", "maxReplicas"}
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for start in (head["rayStartParams"], group["rayStartParams"]):
        assert all(isinstance(value, str) for value in start.values())
    workers = spec["entrypoint"].split("--workers ")[1].split()[0]
    assert group["maxReplicas"] == int(workers)  # each has one GPU, and one worker on it


DEPLOY = ROOT / "configs/deploy"


@pytest.mark.parametrize(
    "path",
    [CLUSTER / "Dockerfile.cpu", CLUSTER / "Dockerfile.cuda", DEPLOY / "Dockerfile"],
    ids=lambda p: p.name,
)
def test_an_image_holds_every_package(path):
    text = path.read_text()
    if path.parent == CLUSTER:
        assert "ENV RAY_AUTH_MODE=token" in text
        assert "'.[s3]'" in text
    for line in (ROOT / "pyproject.toml").read_text().splitlines():
        if line.startswith("packages = "):
            packages = {p.strip(' "').partition(".")[0] for p in line[12:-1].split(",")}
    assert all(f"COPY {package} {package}" in text for package in packages)


# live streams


def assert_taken(program, arguments):
    """`restore-stream` has all these options and takes their values; nothing starts."""
    from pipeline.cli_stream import app

    assert program.endswith("restore-stream")
    typer.main.get_command(app).make_context(program, list(arguments))


def test_the_example_of_several_cameras_loads_with_its_variables():
    from pipeline.cli_stream import _streams

    with pytest.MonkeyPatch.context() as patch:
        for line in (DEPLOY / "restore-stream.env.example").read_text().splitlines():
            if not line.startswith("#"):
                name, _, value = line.partition("=")
                patch.setenv(name, value.strip("'"))
        streams = _streams([], (None, None), DEPLOY / "cameras.yaml", {})
    assert list(streams) == ["gate", "yard", "door"]
    source, _, config = streams["yard"]
    assert str(source) == "yard (rtsp://***@192.0.2.12/stream1)"
    assert (config.live.transport, config.live.stall_timeout_seconds) == ("udp", 10)


def test_systemd_takes_the_unit(tmp_path):
    text = (DEPLOY / "restore-stream.service").read_text()
    (command,) = re.findall("^ExecStart=(.*)$", text, re.MULTILINE)
    program, *arguments = shlex.split(command)
    assert_taken(program, arguments)
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd here to read the unit")
    unit = tmp_path / "restore-stream.service"
    unit.write_text(text.replace(program, sys.executable))  # it must be there
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if "restore-stream" in line]
    assert (done.returncode, said) == (0, [])


def test_the_image_starts_what_is_there():
    text = (DEPLOY / "Dockerfile").read_text()
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)
    (arguments,) = re.findall(r"^CMD (.*)$", text, re.MULTILINE)
    assert_taken(json.loads(entry)[0], json.loads(arguments))
