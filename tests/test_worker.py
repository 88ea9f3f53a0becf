import copy
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiles_of_noise import YUV420, assert_equal
from torch import nn

import mtair
from mtair.checkpoint import save
from workers.spec import PlaneSpec, WeightsError, WeightsInfo, WorkerError, WorkerSpec
from workers.worker import TileWorker, describe_weights

GRAY_10_BIT = PlaneSpec(1, 0, 0, 10, "bt709", True, "left")
TILE = (48, 32)
TESTS = Path(__file__).parent


class Brighten(nn.Module):
    """Adds a constant to R, G and B. Notes the size of each batch and its own precision."""

    def __init__(self, by=0.1):
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by))
        self.seen = []

    def forward(self, rgb):
        self.seen.append((len(rgb), self.by.dtype))
        return rgb + self.by


class OverflowsIn(Brighten):
    """Infinite in some precisions, as a deep network is in half."""

    def __init__(self, *dtypes):
        super().__init__(by=0.5)
        self.dtypes = dtypes

    def forward(self, rgb):
        out = super().forward(rgb)
        return out / 0 if self.by.dtype in self.dtypes else out


class OnlyFits(Brighten):
    """Runs out of memory with more than `limit` tiles."""

    def __init__(self, limit, error):
        super().__init__()
        self.limit, self.error = limit, error

    def forward(self, rgb):
        out = super().forward(rgb)
        if len(rgb) > self.limit:
            raise self.error
        return out


CPU_OUT_OF_MEMORY = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 281474976710656 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.fixture
def worker_with(monkeypatch):
    def build(model, planes=YUV420, precision="fp32", **spec):
        def load(name, device):
            loaded = copy.deepcopy(model)
            loaded.seen = model.seen
            return loaded

        monkeypatch.setattr(mtair, "load_model", load)
        return TileWorker(WorkerSpec("some", planes, precision=precision, **spec))

    return build


def tiles(n, spec=YUV420, seed=0):
    rng = np.random.default_rng(seed)
    height, width = TILE
    shapes = [(n, height, width)]
    if spec.n_planes == 3:
        shapes += 2 * [(n, height >> spec.log2_chroma_h, width >> spec.log2_chroma_w)]
    dtype = np.uint8 if spec.bit_depth == 8 else np.uint16
    # Mid-grays: no RGB is outside 0..1, so that a constant is added to each pixel exactly.
    low, high = (110 << spec.bit_depth - 8, 150 << spec.bit_depth - 8)
    return tuple(rng.integers(low, high, shape, dtype) for shape in shapes)


def brightened(batch, luma_steps):
    return (batch[0] + batch[0].dtype.type(luma_steps), *batch[1:])


@pytest.mark.parametrize(
    ("spec", "luma_steps"),
    [(YUV420, round(0.1 * 219)), (GRAY_10_BIT, round(0.1 * 1023))],
    ids=["yuv420p", "gray10le"],
)
def test_the_residual_is_added_to_the_source_planes(worker_with, spec, luma_steps):
    batch = tiles(3, spec)
    assert_equal(worker_with(Brighten(), spec)(batch), brightened(batch, luma_steps))


def test_strength_scales_the_residual(worker_with):
    batch = tiles(2)
    assert_equal(worker_with(Brighten(), strength=0.5)(batch), brightened(batch, round(0.05 * 219)))


def test_strength_zero_is_the_identity_and_runs_no_network(worker_with):
    model, batch = Brighten(), tiles(2)
    assert_equal(worker_with(model, strength=0.0)(batch), batch)
    assert model.seen == []


def test_a_network_that_changes_nothing_gives_the_same_bits(worker_with):
    batch = tiles(2)
    for precision in ("fp32", "bf16"):
        assert_equal(worker_with(Brighten(by=0.0), precision=precision)(batch), batch)


def test_read_only_arrays_are_taken_and_left_alone(worker_with):
    batch = tiles(2)
    for plane in batch:
        plane.flags.writeable = False
    assert_equal(worker_with(Brighten())(batch), brightened(tiles(2), 22))


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"neon": True, "bf16": True}, torch.bfloat16),
        ({"avx512_f": True, "avx512_bf16": False}, torch.float32),
        ({"neon": True}, torch.float32),
    ],
)
def test_auto_is_bf16_where_the_processor_computes_in_it(
    worker_with, monkeypatch, capabilities, dtype
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    model = Brighten()
    worker_with(model, precision="auto")(tiles(1))
    assert model.seen == [(1, dtype)]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_an_overflow_in_half_precision_is_redone_once_in_float32(worker_with, precision):
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    model, batch = OverflowsIn(half), tiles(2)
    worker = worker_with(model, precision=precision, strength=0.2)
    assert_equal(worker(batch), brightened(batch, 22))
    assert model.seen == [(2, half), (2, torch.float32)]


class OverflowsOnBright(Brighten):
    """Infinite in half precision on the tiles that are brighter than the others."""

    def forward(self, rgb):
        out = super().forward(rgb)
        if self.by.dtype != torch.float32:
            out[rgb.mean((1, 2, 3)) > 0.55, 0, 0, 0] = torch.inf
        return out


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_only_the_tile_that_overflows_is_done_again(worker_with, precision, caplog):
    model, batch = OverflowsOnBright(), tiles(4)
    batch[0][2] = 150
    worker = worker_with(model, precision=precision)
    assert_equal(worker(batch), brightened(batch, 22))
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert model.seen == [(4, half), (1, torch.float32)]
    assert "not finite" in caplog.text
    assert "1 of 4 tiles" in caplog.text
    caplog.clear()
    worker(batch)
    assert "not finite" not in caplog.text, "said once"


@pytest.mark.usefixtures("one_thread")
def test_a_real_network_that_overflows_in_half_is_done_in_float32(tiny_checkpoint, tmp_path):
    """Its first map is above 65,504, which is all that float16 can hold."""
    model = mtair.load_model(tiny_checkpoint)
    with torch.no_grad():
        model.patch_embed["proj"].weight *= 1e6
    path = tmp_path / "large.safetensors"
    save(model, path, {})
    batch = tiles(2)
    half, single = (
        TileWorker(WorkerSpec(str(path), YUV420, precision=p)) for p in ("fp16", "fp32")
    )
    assert_equal(half(batch), single(batch))
    assert not np.array_equal(half(batch)[0], batch[0])


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_an_output_that_is_not_finite_in_float32_is_an_error(worker_with, precision):
    model = OverflowsIn(torch.bfloat16, torch.float32)
    worker = worker_with(model, precision=precision)
    with pytest.raises(WorkerError, match="not finite even in float32: the weights 'some'"):
        worker(tiles(2))
    assert len(model.seen) == (1 if precision == "fp32" else 2)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), CPU_OUT_OF_MEMORY, MemoryError()],
    ids=["cuda", "cpu", "python"],
)
def test_out_of_memory_halves_the_batch_and_gives_every_tile(worker_with, error):
    model, batch = OnlyFits(2, error), tiles(7)
    worker = worker_with(model)
    assert_equal(worker(batch), brightened(batch, 22))
    assert [n for n, _ in model.seen] == [7, 3, 1, 1, 1, 1, 1, 1, 1]


def test_the_halved_batch_size_is_kept(worker_with):
    model = OnlyFits(2, MemoryError())
    worker = worker_with(model)
    worker(tiles(4))
    model.seen.clear()
    assert_equal(worker(tiles(4, seed=1)), brightened(tiles(4, seed=1), 22))
    assert [n for n, _ in model.seen] == [2, 2]


class CostsMoreTogether(Brighten):
    """A call of more than one tile takes long."""

    def forward(self, rgb):
        time.sleep(0.02 * (len(rgb) - 1))
        return super().forward(rgb)


def test_warming_up_finds_how_many_tiles_at_once_are_fastest(worker_with, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    info = WeightsInfo("some", "0" * 64, 8)
    monkeypatch.setattr("workers.worker.describe_weights", lambda _: info)
    model, batch = CostsMoreTogether(), tiles(4)
    worker = worker_with(model)
    worker.warm_up(batch)
    model.seen.clear()
    assert_equal(worker(batch), brightened(batch, 22))
    assert [n for n, _ in model.seen] == [1, 1, 1, 1]
    model.seen.clear()
    worker_with(model).warm_up(batch)
    assert [n for n, _ in model.seen] == [1, 1, 1, 1], "measured again"


def test_warming_up_with_one_tile_measures_nothing(worker_with):
    model = Brighten()
    worker_with(model).warm_up(tiles(1))
    assert len(model.seen) == 1


class FitsPixels(Brighten):
    """Runs out of memory with a tile of more than `limit` pixels."""

    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def forward(self, rgb):
        out = super().forward(rgb)
        if rgb[:, 0].numel() > self.limit:
            raise MemoryError
        return out


@pytest.mark.parametrize("spec", [YUV420, GRAY_10_BIT], ids=["yuv420p", "gray10le"])
@pytest.mark.parametrize("size", [(192, 256), (250, 130), (1080, 64)])
def test_a_tile_that_does_not_fit_is_halved_until_it_does(worker_with, monkeypatch, size, spec):
    monkeypatch.setitem(globals(), "TILE", size)
    batch = tiles(2, spec)
    worker = worker_with(FitsPixels(160 * 192), spec)
    luma_steps = 22 if spec is YUV420 else round(0.1 * 1023)
    assert_equal(worker(batch), brightened(batch, luma_steps))


def test_one_tile_that_does_not_fit_is_an_error(worker_with):
    worker = worker_with(OnlyFits(0, MemoryError()))
    with pytest.raises(WorkerError, match="one tile of 32x48: use a smaller --tile"):
        worker(tiles(4))


def test_a_batch_may_ask_for_the_second_network(monkeypatch):
    networks = {"big": Brighten(0.1), "small": Brighten(0.05)}
    monkeypatch.setattr(mtair, "load_model", lambda name, device: networks[name])
    worker = TileWorker(WorkerSpec("big", YUV420, precision="fp32", smaller="small"))
    batch = tiles(1)
    worker.warm_up(batch)
    assert [len(network.seen) for network in networks.values()] == [1, 1]
    assert_equal(worker(batch, None, True), brightened(batch, round(0.05 * 219)))
    assert_equal(worker(batch), brightened(batch, round(0.1 * 219)))


def test_any_other_error_is_left_as_it_is(worker_with):
    model = OnlyFits(0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        worker_with(model)(tiles(2))
    assert len(model.seen) == 1


def test_a_real_network_changes_tiles_one_by_one(tiny_checkpoint):
    worker = TileWorker(WorkerSpec(tiny_checkpoint, YUV420, precision="fp32", threads=1))
    batch = tiles(3)
    worker.warm_up(batch)
    together = worker(batch)
    assert not np.array_equal(together[0], batch[0])
    for row in range(3):
        alone = worker(tuple(plane[row : row + 1] for plane in batch))
        # The order of a sum may differ with the batch's size: a rounding step at most.
        for one, all_three in zip(alone, together, strict=True):
            assert np.abs(one[0].astype(int) - all_three[row]).max() <= 1


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpu_restores_as_the_cpu_does(precision):
    spec = WorkerSpec("tiny", YUV420, precision="fp32")
    batch = tiles(3)
    gpu = TileWorker(replace(spec, device="cuda:0", precision=precision))
    gpu.warm_up(batch)
    for plane, other in zip(gpu(batch), TileWorker(spec)(batch), strict=True):
        assert np.abs(plane.astype(int) - other).max() <= (1 if precision == "fp32" else 4)


def test_missing_weights_are_a_weights_error(tmp_path):
    for start in (describe_weights, lambda path: TileWorker(WorkerSpec(path, YUV420))):
        with pytest.raises(WeightsError, match="nothing"):
            start(str(tmp_path / "nothing.safetensors"))


def test_weights_are_described(tiny_checkpoint):
    info = describe_weights(tiny_checkpoint)
    assert info.stride == mtair.load_model(tiny_checkpoint).stride
    assert len(info.sha256) == 64


@pytest.mark.parametrize("device", ["cuda:99", "toaster"])
def test_a_device_that_is_not_here_is_an_error(device, tiny_checkpoint):
    with pytest.raises(WorkerError, match=device):
        TileWorker(WorkerSpec(tiny_checkpoint, YUV420, device=device))


def test_importing_the_package_loads_neither_ray_nor_torch():
    code = "import sys, workers; assert not {'ray', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_shipped_network_gives_the_same_bits_in_every_process_and_with_any_threads(tmp_path):
    code = (
        "import hashlib, sys; import numpy as np; from test_worker import YUV420\n"
        "from workers.worker import TileWorker\n"
        "from workers.spec import WorkerSpec\n"
        "worker = TileWorker(WorkerSpec('tiny', YUV420, 'cpu', threads=int(sys.argv[1])))\n"
        "rng = np.random.default_rng(0)\n"
        "sizes = (96, 128), (48, 64), (48, 64)\n"
        "tiles = [rng.integers(0, 255, (1, *s), np.uint8) for s in sizes]\n"
        "print(hashlib.sha256(b''.join(p.tobytes() for p in worker(tuple(tiles)))).hexdigest())\n"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code, threads], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}",
                 "NUMBA_CACHE_DIR": str(tmp_path)},  # the first compiles, the others find that
        ).stdout
        for threads in ("1", "2", "2")
    }  # fmt: skip
    assert len(found) == 1
