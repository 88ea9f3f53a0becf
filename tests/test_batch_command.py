"""restore-batch as a command: killed and run again, as a Ray job, its help."""

import json
import signal
import subprocess
import sys
import tempfile

import pytest
from batches import batch_command
from commands import ONE_THREAD, sha256, wait_for

pytestmark = [
    pytest.mark.ray, pytest.mark.timeout(200),
    pytest.mark.usefixtures("ray_of_two_cpus", "one_thread"),
]  # fmt: skip

SUBMIT = """
import json, subprocess, sys, time, urllib.request
from workers import cluster
cluster._stay_private()
import ray
from ray._private import parameter
honest = parameter.RayParams.__init__  # ray.init has no argument for the agent's port, which the
def any_port(self, **more):            # Ray of the other tests has taken
    honest(self, **{"dashboard_agent_listen_port": 0, **more})
parameter.RayParams.__init__ = any_port
context = ray.init(address="local", num_cpus=2, include_dashboard=True, dashboard_host="127.0.0.1",
    dashboard_port=0, log_to_driver=False, object_store_memory=200 << 20, _temp_dir=sys.argv[2])
# A job joins the Ray named here, as `ray start` does, and else any that it finds on the machine,
# the one of the other tests too: https://github.com/ray-project/ray, find_gcs_addresses.
ray._private.utils.write_ray_address(context.address_info["gcs_address"], sys.argv[2])
submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address",
    f"http://{context.dashboard_url}", "--", *json.loads(sys.argv[1])]
for _ in range(20):
    done = subprocess.run(submit, capture_output=True, text=True)
    if "No available agent" not in done.stderr:
        break
    time.sleep(1)  # it comes up some seconds after ray.init returns
port = ray.nodes()[0]["MetricsExportPort"]
metrics = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
print(metrics, done.stdout, done.stderr)
sys.exit(done.returncode)
"""


@pytest.mark.slow
def test_it_runs_as_a_ray_job_whose_metrics_are_rays(tmp_path, batch_source, batch_settings, alone):
    folder = tmp_path / "out"
    entrypoint = batch_command(batch_source, folder, batch_settings, "--ray-address", "auto")
    with tempfile.TemporaryDirectory() as short:  # the path of a socket has 107 letters
        done = subprocess.run(
            [sys.executable, "-c", SUBMIT, json.dumps(entrypoint), short],
            capture_output=True, text=True, check=False, timeout=180, env=ONE_THREAD,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert sha256(folder / "a.mkv") == alone
    assert "1 done, 0 finished before, 0 failed" in done.stdout
    (n_done,) = [
        x for x in done.stdout.splitlines() if x.startswith("ray_restore_parts_done_total{")
    ]
    assert n_done.endswith(" 9.0")
    assert "ray_restore_workers{" in done.stdout


def test_a_killed_command_is_run_again_and_ends_with_the_same_bytes(
    tmp_path, batch_source, batch_settings, alone
):
    folder = tmp_path / "out"
    process = subprocess.Popen(
        batch_command(batch_source, folder, batch_settings), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env=ONE_THREAD,
    )  # fmt: skip
    work = folder / ".a.mkv.restore"
    wait_for(process, lambda: len(list(work.glob("*.segment"))) >= 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "a.mkv").exists()
    batch_source.with_name("bad.mkv").write_bytes(b"this is no video")
    done = subprocess.run(
        batch_command(batch_source.parent, folder, batch_settings, "--log-format", "json"),
        capture_output=True, text=True, check=False, timeout=150, env=ONE_THREAD,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert sha256(folder / "a.mkv") == alone
    assert "are finished already" in done.stderr, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("done")
    assert lines[0].endswith("90 frames")
    assert lines[1].startswith("failed")
    assert "bad.mkv" in lines[1]
    assert lines[2].startswith("1 done, 0 finished before, 1 failed in ")
    assert all(json.loads(line) for line in done.stderr.splitlines())
    report = json.loads((folder / "restore-batch.json").read_text())
    assert report["counts"] == {"done": 1, "failed": 1}


def test_help_is_quick_and_a_wrong_manifest_is_a_usage_error(tmp_path):
    code = "import sys; from pipeline.cli_batch import app; app(standalone_mode=False); " \
        "sys.exit(bool({'torch', 'ray', 'av'} & set(sys.modules)))"  # fmt: skip
    helped = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False
    )
    assert helped.returncode == 0
    assert "--ray-address" in helped.stdout
    (tmp_path / "l.csv").write_text("source,wrong\na.mkv,1\n")
    failed = subprocess.run(
        [sys.executable, "-c", "from pipeline.cli_batch import main; main()",
         str(tmp_path / "l.csv"), "-o", str(tmp_path / "out")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert failed.returncode == 2
    assert "l.csv:2: wrong: unknown setting" in failed.stderr
