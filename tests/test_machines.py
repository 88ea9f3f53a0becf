"""A batch on machines that come and go."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ONE_THREAD, sha256

pytestmark = [
    pytest.mark.ray, pytest.mark.timeout(200),
    pytest.mark.usefixtures("ray_of_two_cpus", "one_thread"),
]  # fmt: skip

MACHINES = """
import json, sys
from pathlib import Path
from workers import cluster
cluster._stay_private()
import ray
from ray.cluster_utils import Cluster as Machines
sys.path.insert(0, sys.argv[4])
import pipeline.batch
import pipeline.in_work
import pipeline.part_job
from pipeline.inputs import list_inputs
import ray.cloudpickle
import batches
from batches import SlowJob
from workers import Limits
ray.cloudpickle.register_pickle_by_value(batches)
pipeline.batch.PartJob = SlowJob
# A lost machine is no try: else the first one would be the end.
pipeline.part_job.Limits = lambda **more: Limits(tries=1, **more)
small = {"object_store_memory": 200 << 20}
checks = {  # a machine that is gone is given up after 2 s instead of 15, a slow one is not
    "health_check_initial_delay_ms": 0, "health_check_period_ms": 500,
    "health_check_timeout_ms": 5000, "health_check_failure_threshold": 4}
machines = Machines(
    initialize_head=True, head_node_args={"num_cpus": 0, **small, "_system_config": checks})
first = machines.add_node(num_cpus=1, **small)
ray.init(address=machines.address, log_to_driver=False)
events = []
def happen(now):
    if now.n_frames >= 20 and not events:
        events.append("one more machine")
        machines.add_node(num_cpus=1, **small)
    if now.n_frames >= 50 and len(events) == 1:
        events.append("the first one is gone")
        machines.remove_node(first, allow_graceful=False)
settings, folder = json.loads(sys.argv[3]), Path(sys.argv[2])
report = pipeline.batch.restore_batch(
    list_inputs([sys.argv[1]], folder, settings, None), folder, on_progress=happen)
report.write(folder / "report.json")
print(events, flush=True)
ray.shutdown()
machines.shutdown()
"""


@pytest.mark.slow
def test_machines_come_and_go_in_the_middle(tmp_path, batch_source, batch_settings, alone):
    folder = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", MACHINES, str(batch_source), str(folder), json.dumps(batch_settings),
         str(Path(__file__).parent)],
        capture_output=True, text=True, check=False, timeout=180, env=ONE_THREAD,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "one more machine" in done.stdout
    assert "the first one is gone" in done.stdout
    (file,) = json.loads((folder / "report.json").read_text())["files"]
    assert file["status"] == "done", file
    assert 1 <= file["n_retries"] <= 2
    assert sha256(folder / "a.mkv") == alone
