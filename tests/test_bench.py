"""`mtair bench`: what it counts, what it compares, and what it prints."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from mtair import MTAIR, Dimensions, bench, fused, scan
from mtair.cli import app

CONFIGS = Path(__file__).parents[1] / "configs/models"
SMALL = {
    "widths": [16, 16, 16, 16], "depths": [1, 1, 1, 1], "refinement": 0, "heads": [1, 1, 1, 1],
    "ffn_expansion": 1.0, "prompt_dims": [4, 4, 4, 4], "prompt_sizes": [4, 4, 4, 4],
    "d_state": 1, "expand": 1.0,
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def dimensions(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return str(path)


@pytest.mark.parametrize(("name", "gmac"), [("tiny", 1.929), ("base", 265.4)])
def test_it_counts_what_the_published_counts_count(name, gmac):
    dims = Dimensions.from_dict(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))
    assert bench.multiply_accumulates(dims, 256, 256) == pytest.approx(gmac, rel=1e-3)


def test_json_has_the_paths_of_this_machine_and_the_ratio(dimensions):
    args = ["bench", "--model", dimensions, "--size", "24x16", "--runs", "1", "--json"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    assert f"torch {torch.__version__}" in report["machine"]
    plain, *others = report["rows"]
    assert plain["path"] == "plain: fp32, NCHW, eager, reference scan"
    assert [row["path"] for row in others] == [
        "fp32, NCHW, eager, numba scan", "fp32, numba scan", "bf16, numba scan"
    ]  # fmt: skip
    assert plain["times_plain"] == 1
    for row in report["rows"]:
        assert (row["width"], row["height"], row["passes"]) == (24, 16, 1)
        assert sum(row["ms_by_kind"].values()) == pytest.approx(row["ms"])
        assert row["times_plain"] == pytest.approx(plain["ms"] / row["ms"])
        assert set(row["ms_by_kind"]) == {*bench.KINDS.values(), bench.REST}


def test_the_plain_path_is_plain_and_computes_the_same(monkeypatch):
    torch.manual_seed(0)
    model = MTAIR(Dimensions.from_dict(SMALL)).eval()
    image = torch.rand(1, 3, 16, 24)
    with torch.no_grad():
        want = model(image)
    bench.as_eager(model)
    layouts = []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, x, y: layouts.append(x[0].is_contiguous()))
    monkeypatch.setattr(fused, "dual_block", None)
    clock = itertools.count()
    plain = bench.paths(image.device)[0]
    bench.measure(model, image, 1, lambda: float(next(clock)), plain)
    assert layouts
    assert all(layouts)
    torch.testing.assert_close(model(image), want, atol=1e-5, rtol=0)


def test_a_long_pass_is_measured_once():
    model = MTAIR(Dimensions.from_dict(SMALL)).eval()
    ticks = itertools.count(step=100.0)
    image = torch.rand(1, 3, 8, 8)
    fused_way = bench.paths(image.device)[-1]
    ms, by_kind, passes = bench.measure(model, image, 5, lambda: next(ticks), fused_way)
    assert passes == 1
    assert sum(by_kind.values()) == ms


def test_a_gpu_is_measured_with_every_scan_that_it_has(monkeypatch):
    there = {"triton", "mamba_ssm", "selective_scan_cuda"}
    monkeypatch.setattr(scan, "_has", lambda module: module in there)
    ways = bench.paths(torch.device("cuda"))
    assert [(way.backend, way.dtype, way.eager) for way in ways] == [
        ("reference", torch.float32, True),
        ("triton", torch.float32, True),
        ("mamba_ssm", torch.float32, True),
        ("triton", torch.float32, False),
        ("triton", torch.bfloat16, False),
        ("triton", torch.bfloat16, False),
    ]
    assert [way.graph for way in ways] == [False] * 5 + [True]
    assert len({way.label for way in ways}) == 6


def test_a_gpu_is_timed_by_marks_in_its_own_queue(monkeypatch):
    class Event:
        ticks = itertools.count()

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(self.ticks)

        def synchronize(self):
            self.done = True

        def elapsed_time(self, end):
            assert end.done
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    mark, between = bench.moments(torch.device("cuda"), lambda: 0.0)
    first, _, last = mark(), mark(), mark()
    assert between(first, last) == 2


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_a_gpu_is_measured(dimensions):
    args = ["--model", dimensions, "--size", "64x48", "--runs", "2", "--device", "cuda:0", "--json"]
    result = CliRunner().invoke(app, ["bench", *args])
    assert result.exit_code == 0, result.output
    for row in json.loads(result.output)["rows"]:
        assert row["passes"] == 2
        if not row["path"].endswith("CUDA graph"):
            assert sum(row["ms_by_kind"].values()) == pytest.approx(row["ms"])


def test_a_path_that_runs_out_of_memory_is_said_and_the_others_are_measured(
    dimensions, monkeypatch
):
    real = bench.measure

    def measure(model, *args):
        if model.output.weight.dtype == torch.float32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, *args)

    monkeypatch.setattr(bench, "measure", measure)
    rows = list(bench.bench([dimensions], [(16, 16)], torch.device("cpu"), 1))
    assert [bool(row.ms) for row in rows] == [False, False, False, True]
    assert "out of memory" in bench.table(rows)


def test_the_table_comes_row_by_row(dimensions):
    sizes = ["--size", "16x16", "--size", "24x16"]
    result = CliRunner().invoke(app, ["bench", "--model", dimensions, "--runs", "1", *sizes])
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("|")]
    assert [line.count("|") for line in lines] == [11] * (2 + 2 * 4)
    assert lines[0].startswith("| model | size | path |")
    assert sum("---" in line for line in lines) == 1


def test_a_plain_scan_that_does_not_fit_is_said_and_not_run(dimensions, monkeypatch):
    monkeypatch.setattr(bench, "free_memory", lambda device: 1000)
    rows = list(bench.bench([dimensions], [(16, 16)], torch.device("cpu"), 1))
    assert rows[0].ms is None
    assert "GiB" in rows[0].note
    assert rows[1].ms
    assert rows[1].times_plain is None
    assert "not run" in bench.table(rows)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--size", "big"], "expected WIDTHxHEIGHT"),
        (["--device", "cuda:63"], "no cuda:63 here"),
        (["--model", "nothing.yaml"], "not a file of dimensions"),
        (["--model", "nothing"], "no weights of that name"),
    ],
)
def test_what_cannot_be_measured_is_one_clear_error(args, says):
    result = CliRunner().invoke(app, ["bench", "--runs", "1", *args])
    assert result.exit_code == 2
    assert says in " ".join(result.output.replace("│", " ").split())
