"""Training: a run that is the same run after an interruption and in several processes."""

import json
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from commands import free_port
from training_data import lay_out, nano_config, write_config

from mtair import checkpoint, state
from mtair.data import TrainingData, make_batch
from mtair.progress import held_out_psnr
from mtair.schedule import TrainConfig
from mtair.train import Trainer, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return lay_out(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def data(root):
    return TrainingData(root)


@pytest.fixture
def config(tmp_path):
    return nano_config(tmp_path)


# Runs


def interrupt_after(monkeypatch, steps):
    whole = Trainer.train_step

    def train_step(self, degraded, clean):
        if self.step == steps:
            raise KeyboardInterrupt
        return whole(self, degraded, clean)

    monkeypatch.setattr(Trainer, "train_step", train_step)


def states(folder):
    return state.load(folder)


def test_an_interrupted_run_ends_as_an_unbroken_one(root, config, tmp_path, monkeypatch):
    config = replace(config, steps=12)
    whole = train(config, root, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            train(config, root, tmp_path / "broken", save_seconds=0)
    assert states(tmp_path / "broken")["step"] == 7
    broken = train(config, root, tmp_path / "broken")
    for part in ("model", "average"):
        want, got = states(tmp_path / "whole")[part], states(tmp_path / "broken")[part]
        assert [k for k in want if not torch.equal(want[k], got[k])] == []
    first, second = checkpoint.describe(str(whole)), checkpoint.describe(str(broken))
    assert first.sha256 == second.sha256
    assert second.record["steps_done"] == 12
    assert second.record["config"]["mixture"] == config.mixture


def test_a_finished_run_is_not_trained_further(root, config, tmp_path):
    config = replace(config, steps=3)
    path = train(config, root, tmp_path / "run")
    before = checkpoint.describe(str(path)).sha256
    assert checkpoint.describe(str(train(config, root, tmp_path / "run"))).sha256 == before


def test_a_run_begins_with_other_weights_and_says_so_also_when_resumed(root, config, tmp_path):
    first = train(replace(config, steps=4), root, tmp_path / "first")
    earlier = checkpoint.describe(str(first))
    trainer = Trainer(config, tmp_path)
    trainer.start_from(str(first))
    trained = checkpoint.load_model(str(first)).state_dict()
    assert all(torch.equal(x, trained[name]) for name, x in trainer.model.state_dict().items())
    second = train(replace(config, steps=6), root, tmp_path / "second", init=str(first))
    train(replace(config, steps=8), root, tmp_path / "second")
    assert checkpoint.describe(str(second)).record["started_from"]["sha256"] == earlier.sha256
    assert earlier.record["started_from"] is None


def test_a_folder_with_the_run_of_another_network_is_refused(root, config, tmp_path):
    train(replace(config, steps=1), root, tmp_path / "run")
    other = yaml.safe_load(Path(config.model).read_text()) | {"refinement": 3}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    config = replace(config, model=str(tmp_path / "other.yaml"), steps=2)
    with pytest.raises(
        state.StateError, match="run: the run there is of another network"
    ) as caught:
        train(config, root, tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_a_folder_with_another_run_is_refused(root, config, tmp_path):
    """Else its weights would say that they are of this one."""
    path = train(replace(config, steps=2), root, tmp_path / "run")
    before = path.read_bytes()
    other = replace(config, steps=4, seed=9, mixture={"rain": 1.0})
    with pytest.raises(state.StateError, match=r"run: .* another mixture and seed; start one in"):
        train(other, root, tmp_path / "run")
    assert path.read_bytes() == before


def test_a_run_is_resumed_without_the_weights_it_began_with(root, config, tmp_path):
    first = train(replace(config, steps=2), root, tmp_path / "first")
    train(replace(config, steps=2), root, tmp_path / "second", init=str(first))
    first.unlink()
    path = train(replace(config, steps=4), root, tmp_path / "second", init=str(first))
    assert checkpoint.describe(str(path)).record["steps_done"] == 4


def test_the_log_of_a_resumed_run_has_each_step_once(root, config, tmp_path):
    """What came after the last saved state is trained, and written, again."""
    config = replace(config, steps=100, stages=[(1.0, 16, 1)], check_steps=25)
    train(replace(config, steps=50), root, tmp_path)
    before = (tmp_path / "log.jsonl").read_text()
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 75, "held_out_psnr_25": 1.0}\n{"step": 100, "loss": 1.0}\n{"st')
    train(config, root, tmp_path)
    after = (tmp_path / "log.jsonl").read_text()
    assert after.startswith(before)
    assert [json.loads(line)["step"] for line in after.splitlines()] == [25, 50, 75, 100]
    assert "1.0}" not in after


def test_hours_are_those_of_all_runs():
    info = checkpoint.describe("tiny")
    record = {"hours": 0.5, "started_from": {"sha256": "0", "hours": 1.25}}
    assert replace(info, record=record).hours == 1.75
    assert replace(info, record={}).hours == 0


def test_progress_is_logged(root, config, tmp_path):
    config = replace(config, steps=50, stages=[(1.0, 16, 1)], check_steps=25)
    train(config, root, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [set(line) for line in lines] == [
        {"step", "held_out_psnr_25"},
        {"step", "loss", "rate", "seconds", "held_out_psnr_25"},
    ]
    assert lines[1]["step"] == 50
    assert 0 < lines[1]["loss"] < 1
    assert 5 < lines[1]["held_out_psnr_25"] < 60
    pictures = sorted((tmp_path / "samples").iterdir())
    assert [path.name for path in pictures] == ["0000025.png", "0000050.png"]
    first, second = (cv2.imread(str(path)) for path in pictures)
    assert first.shape == (len(config.mixture) * 16, 3 * 16, 3)  # degraded, restored, clean
    for column in (slice(0, 16), slice(32, 48)):
        np.testing.assert_array_equal(first[:, column], second[:, column])


def test_the_loss_falls(data, config, tmp_path):
    config = replace(config, steps=400, mixture={"blind_noise": 1.0}, clip_norm=1.0)
    trainer = Trainer(config, tmp_path)
    batch = make_batch(data, config, 0)
    losses = [trainer.train_step(*batch) for _ in range(80)]
    assert np.mean(losses[-3:]) < 0.8 * losses[0]


def test_the_average_follows_the_weights(data, config, tmp_path):
    trainer = Trainer(config, tmp_path)
    start = trainer.model.output.weight.detach().clone()
    trainer.train_step(*make_batch(data, config, 0))
    # decay = min(0.9, (1 + 1) / (10 + 1)) after the first step
    want = torch.lerp(start, trainer.model.output.weight, 1 - 2 / 11)
    torch.testing.assert_close(trainer.average.output.weight, want)
    assert not torch.equal(start, trainer.model.output.weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_before_the_weights(data, config, tmp_path, value):
    trainer = Trainer(config, tmp_path)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    degraded, clean = make_batch(data, config, 0)
    clean[0, 0, 0, 0] = value
    with pytest.raises(FloatingPointError, match=f"loss is {value} at step 0"):
        trainer.train_step(degraded, clean)
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())


def test_a_gradient_that_is_no_number_stops_before_the_weights(data, config, tmp_path):
    trainer = Trainer(config, tmp_path)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.model.output.weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(FloatingPointError, match="gradient is nan at step 0"):
        trainer.train_step(*make_batch(data, config, 0))
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())


def test_held_out_psnr_is_that_of_the_noise_where_nothing_is_restored(data, config, tmp_path):
    trainer = Trainer(config, tmp_path)
    with torch.no_grad():
        trainer.average.output.weight.zero_()
    psnr = held_out_psnr(trainer.average, data)
    assert psnr == pytest.approx(20 * np.log10(255 / 25), abs=0.7)


# Loss and precision


def test_the_spectra_count_as_much_as_they_are_weighted(data, config, tmp_path):
    """Of an error that is the same everywhere, all is in one coefficient: the square root of the
    number of pixels times as large, of n * (n // 2 + 1) complex ones."""
    n = 16
    trainer = Trainer(replace(config, fft_weight=0.5), tmp_path)
    with torch.no_grad():
        trainer.model.output.weight.zero_()
    clean = torch.rand(2, 3, n, n)
    got = trainer.train_step(clean + 0.1, clean)
    assert got == pytest.approx(0.1 + 0.5 * 0.1 * n / (2 * n * (n // 2 + 1)), rel=1e-4)


def test_bfloat16_learns_beside_float32(data, config, tmp_path):
    """The same to some digits, not to all; what is kept is float32."""
    config = replace(config, steps=400, mixture={"blind_noise": 1.0}, clip_norm=1.0)
    low = replace(config, precision="bf16")
    batch = make_batch(data, config, 0)
    one, other = Trainer(config, tmp_path), Trainer(low, tmp_path)
    wide, narrow = ([t.train_step(*batch) for _ in range(20)] for t in (one, other))
    assert narrow == pytest.approx(wide, rel=0.02)
    assert narrow[1:] != wide[1:]
    assert {v.dtype for v in other.model.state_dict().values()} == {torch.float32}


def test_the_scan_is_float32_under_autocast(monkeypatch):
    from mtair import blocks

    seen = []
    scan = blocks.cross_scan

    def spy(*tensors, **options):
        seen.extend(t.dtype for t in tensors)
        return scan(*tensors, **options)

    monkeypatch.setattr(blocks, "cross_scan", spy)
    module = blocks.SS2D(8, 2, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(torch.rand(1, 8, 6, 6))
    assert out.dtype == torch.bfloat16
    assert set(seen) == {torch.float32}


# Several processes


def in_two_processes(before, config_path, root, out):
    """`mtair train` by torchrun, each process after having done what `before` says."""
    options = ["--config", config_path, "--data", root, "--out", out]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python",
        "--master-addr", "127.0.0.1", "--master-port", str(free_port()), sys.executable, "-c",
        f"import os, sys; {before}\nfrom mtair.cli import main; main()", "train",
        *map(str, options),
    ]  # fmt: skip
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def test_processes_that_do_not_see_the_same_folder_are_refused(root, config, tmp_path):
    """As where each node has a disk of its own: only the first would find a state to resume."""
    train(replace(config, steps=2), root, tmp_path / "run0")
    path = write_config(tmp_path / "t.yaml", replace(config, steps=4))
    done = in_two_processes("sys.argv[-1] += os.environ['RANK']", path, root, tmp_path / "run")
    assert done.returncode != 0
    assert "the processes found runs of 0 to 2 steps" in done.stderr
    assert state.load(tmp_path / "run0")["step"] == 2


def test_two_processes_train_as_one_on_the_whole_batch(root, config, tmp_path):
    """Also where a batch has a row for one of them only."""
    stages = [(0.4, 16, 3), (0.6, 16, 1)]
    config = replace(config, steps=50, stages=stages, fft_weight=0.1, check_steps=50)
    config = replace(config, learning_rate=1e-4)  # Adam makes a step of the last bit's sign
    path = write_config(tmp_path / "t.yaml", config)
    alone = train(TrainConfig.load(path), root, tmp_path / "one")  # whose mixture is sorted
    done = in_two_processes("", path, root, tmp_path / "two")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [
        json.loads((tmp_path / run / "log.jsonl").read_text().splitlines()[-1])
        for run in ("one", "two")
    ]
    assert lines[1]["loss"] == pytest.approx(lines[0]["loss"], rel=1e-3)
    assert lines[1]["held_out_psnr_25"] == pytest.approx(lines[0]["held_out_psnr_25"], abs=0.03)
    want = checkpoint.load_model(str(alone)).state_dict()
    got = checkpoint.load_model(str(tmp_path / "two/weights.safetensors")).state_dict()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, atol=5e-4, rtol=0)
    assert checkpoint.describe(str(tmp_path / "two/weights.safetensors")).record["processes"] == 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
def test_a_step_gets_the_memory_of_the_one_before():
    """Activations that go back to the system are zeroed page by page at every step: without this
    a step here has 39,000 faults, for 160 MB."""
    code = (
        "import resource, torch\n"
        "from mtair.memory import keep_freed_memory\n"
        "keep_freed_memory(2**31 - 1)\n"
        "def step():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    kept = [torch.ones(2_000_000) for _ in range(20)]\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "print(*(step() for _ in range(8)))\n"
    )
    faults = list(map(int, subprocess.check_output([sys.executable, "-c", code]).split()))
    # The first step needs the pages, and the heap is cut up anew in the second.
    assert max(faults[4:]) < 1000, faults
