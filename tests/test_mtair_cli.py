"""`mtair` as a user runs it: what is wrong is one line, without a traceback."""

import os
import subprocess
import sys

import pytest

TINY, SMALL = "configs/train/tiny.yaml", "configs/models/small.yaml"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["evaluate", "--data", "{tmp}/none"], "none/CBSD68"),
        (["evaluate", "--data", "{tmp}", "--model", "none.safetensors"], "none.safetensors"),
        (["evaluate"], "--data or --pair"),
        (["import-checkpoint", "{tmp}/no.ckpt", "{tmp}/o", "--model", SMALL], "no.ckpt"),
        (["train", "--config", "{tmp}/no.yaml", "--data", "{tmp}", "--out", "{tmp}/o"], "no.yaml"),
        (["train", "--config", "{tmp}/bad.yaml", "--data", "{tmp}", "--out", "{tmp}/o"], "stepz"),
        (["train", "--config", TINY, "--data", "{tmp}", "--out", "{tmp}/o"], "SOTS_outdoor"),
        (["train", "--config", "{tmp}/torn.yaml", "--data", "{tmp}", "--out", "{tmp}/o"], "torn"),
        (["evaluate", "--data", "{tmp}", "--task", "Rain1000L"], "Rain1000L"),
        (["bench", "--device", "gpu"], "--device gpu"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_code_2(tmp_path, arguments, word):
    (tmp_path / "bad.yaml").write_text("stepz: 3\n")
    (tmp_path / "torn.yaml").write_text("steps: [3\n")
    given = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    command = [sys.executable, "-c", "from mtair.cli import main; main()", *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert word in done.stderr


@pytest.mark.parametrize(("chosen", "counts"), [(None, "2000"), ("70", "70")])
def test_threads_that_wait_do_not_spin_for_long(chosen, counts):
    """Set before anything loads libgomp, which says here what it has read."""
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE"} | ({"GOMP_SPINCOUNT": chosen} if chosen else {})
    done = subprocess.run(
        [sys.executable, "-c", "from mtair.cli import main; main()", "models"],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    assert f"GOMP_SPINCOUNT = '{counts}'" in done.stderr
