"""The Triton scan against the reference: on a GPU natively, elsewhere in Triton's interpreter.

The interpreter takes milliseconds for a step of a scan: here blocks are small, so that small maps
have several chunks and ragged ends.
"""

import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scans import gradients, image_inputs, relative, scan_inputs, strided, with_positive_steps

from mtair.scan import ScanUnavailable, cross_scan, selective_scan

ROOT = Path(__file__).parents[1]
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}

if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)
with pytest.MonkeyPatch.context() as patch:
    if not HAS_GPU:  # for the kernels; for Triton's own functions, see conftest.py
        patch.setenv("TRITON_INTERPRET", "1")
    from mtair.scan import triton_cuda

SMALL = triton_cuda.Blocks(chunk=4, channels=4, chunks=2, lanes=8)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    if not HAS_GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(triton_cuda, "TRAINING", SMALL)
    monkeypatch.setattr(triton_cuda, "_for_inference", lambda *_: SMALL)


@pytest.fixture
def seed():
    """Fresh inputs at every run; the assertions name the seed that failed."""
    return secrets.randbelow(2**31)


def on_device(inputs, dtype=torch.float32):
    return {name: x.to(DEVICE, dtype) for name, x in inputs.items()}


def exact(inputs):
    return {name: x.double() for name, x in inputs.items()}


def assert_scan_follows(inputs, tolerance, seed, softplus=True):
    want = selective_scan(**exact(inputs), delta_softplus=softplus, backend="reference")
    got = selective_scan(**inputs, delta_softplus=softplus, backend="triton")
    assert got.dtype == inputs["u"].dtype
    assert relative(got.double(), want) < tolerance, f"seed {seed}"


def assert_cross_scan_follows(inputs, height, width, tolerance, seed):
    want = cross_scan(**exact(inputs), height=height, width=width, backend="reference")
    got = cross_scan(**inputs, height=height, width=width, backend="triton")
    assert got.dtype == torch.promote_types(inputs["x"].dtype, torch.float32)
    assert relative(got.double(), want) < tolerance, f"seed {seed}"


@pytest.mark.parametrize("states", [1, 4, 16])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65])
@pytest.mark.usefixtures("small_blocks")
def test_selective_scan_equals_the_reference_at_any_length(length, states, seed):
    inputs = on_device(scan_inputs(seed, n=1, d=3, states=states, groups=1, length=length))
    assert_scan_follows(inputs, 1e-5, seed)


@pytest.mark.parametrize("states", [1, 4, 16])
def test_selective_scan_equals_the_reference_over_many_chunks(states, seed):
    inputs = on_device(scan_inputs(seed, n=1, d=3, states=states, groups=1, length=1000))
    assert_scan_follows(inputs, 1e-5, seed)


@pytest.mark.parametrize("states", [1, 4, 16])
@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.usefixtures("small_blocks")
def test_selective_scan_equals_the_reference_with_any_states(states, softplus, seed):
    forms = ("[N,G,S,L]", "[N,S,L]")
    inputs = scan_inputs(seed, n=2, d=4, states=states, groups=2, length=11, forms=forms)
    if not softplus:
        inputs = with_positive_steps(inputs)
    assert_scan_follows(on_device(inputs), 1e-5, seed, softplus)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (9, 1), (3, 5), (5, 3)])
@pytest.mark.usefixtures("small_blocks")
def test_cross_scan_equals_the_reference_on_any_map(height, width, seed):
    inputs = on_device(image_inputs(seed, height, width, n=1, d=3, states=2))
    assert_cross_scan_follows(inputs, height, width, 1e-5, seed)


@pytest.mark.parametrize("states", [1, 3, 16])
@pytest.mark.usefixtures("small_blocks")
def test_cross_scan_equals_the_reference_with_any_states(states, seed):
    inputs = on_device(image_inputs(seed, 2, 3, n=2, d=5, states=states))
    assert_cross_scan_follows(inputs, 2, 3, 1e-5, seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("small_blocks")
def test_low_precision_in_float32_inside(dtype, seed):
    inputs = on_device(image_inputs(seed, 2, 3, n=1, d=3, states=2), dtype)
    assert_cross_scan_follows(inputs, 2, 3, 1e-5, seed)
    inputs = on_device(scan_inputs(seed, n=1, d=3, states=2, groups=1, length=9), dtype)
    assert_scan_follows(inputs, 1e-2, seed)


@pytest.mark.usefixtures("small_blocks")
def test_memory_layout_does_not_matter(seed):
    inputs = on_device(image_inputs(seed, 2, 3, n=1, d=3, states=2))
    scattered = {name: strided(x) for name, x in inputs.items()}
    assert not scattered["projection"].is_contiguous()
    assert_cross_scan_follows(scattered, 2, 3, 1e-5, seed)
    inputs = on_device(scan_inputs(seed, n=1, d=3, states=2, groups=1, length=7))
    scattered = {name: strided(x) for name, x in inputs.items()}
    assert_scan_follows(scattered, 1e-5, seed)


@pytest.mark.parametrize("decay", [-1e3, -1e30])
@pytest.mark.usefixtures("small_blocks")
def test_a_state_that_decays_at_once_is_forgotten_without_nan(decay, seed):
    inputs = on_device(scan_inputs(seed, n=1, d=2, states=1, length=11, groups=1))
    del inputs["z"], inputs["D"], inputs["delta_bias"]
    inputs["A"] = torch.full_like(inputs["A"], decay)
    inputs["delta"] = inputs["delta"].abs() + 1
    for x in inputs.values():
        x.requires_grad_()
    got = selective_scan(**inputs, backend="triton")
    want = inputs["delta"] * inputs["u"] * (inputs["B"] * inputs["C"]).sum(2)
    assert relative(got, want) < 1e-5, f"seed {seed}"
    weights = torch.randn_like(got)
    wanted = torch.autograd.grad((want * weights).sum(), [inputs["u"], inputs["delta"]])
    (got * weights).sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs.values()), f"seed {seed}"
    assert relative(inputs["u"].grad, wanted[0]) < 1e-5, f"seed {seed}"
    assert relative(inputs["delta"].grad, wanted[1]) < 1e-5, f"seed {seed}"


@pytest.mark.parametrize("decay", [-1e3, -1e30])
@pytest.mark.usefixtures("small_blocks")
def test_cross_scan_forgets_at_once_without_nan(decay, seed):
    inputs = on_device(image_inputs(seed, 3, 5, n=1, d=3, states=2))
    inputs["A"] = torch.full_like(inputs["A"], decay)
    inputs["dt_bias"] = inputs["dt_bias"].abs() + 20  # steps of some 20
    assert_cross_scan_follows(inputs, 3, 5, 1e-5, seed)


@pytest.mark.usefixtures("small_blocks")
def test_a_step_far_below_one_keeps_its_precision(seed):
    """softplus(-12) is 6e-6: in float32, log(1 + e) alone would be two per cent off."""
    inputs = on_device(image_inputs(seed, 2, 5, n=1, d=3, states=1))
    inputs["dt_bias"] = inputs["dt_bias"] - 12
    assert_cross_scan_follows(inputs, 2, 5, 1e-5, seed)


def assert_gradients_follow(scan, inputs, tolerance, seed):
    name = "u" if "u" in inputs else "x"
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(inputs[name].shape, generator=generator).to(DEVICE)
    want = gradients(lambda **t: scan(**t, backend="reference"), exact(inputs), weights.double())
    got = gradients(lambda **t: scan(**t, backend="triton"), inputs, weights)
    for key, x in inputs.items():
        assert got[key].dtype == x.dtype
        assert relative(got[key].double(), want[key]) < tolerance, f"{key}, seed {seed}"


@pytest.mark.parametrize(
    ("height", "width", "dtype"),
    [(1, 1, torch.float32), (2, 5, torch.float32), (2, 3, torch.bfloat16)],
)
@pytest.mark.usefixtures("small_blocks")
def test_gradients_of_cross_scan_equal_those_of_the_reference(height, width, dtype, seed):
    def scan(**t):
        return cross_scan(**t, height=height, width=width)

    inputs = on_device(image_inputs(seed, height, width, n=1, d=3, states=2), dtype)
    assert_gradients_follow(scan, inputs, TOLERANCE[dtype], seed)


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.usefixtures("small_blocks")
def test_gradients_of_selective_scan_equal_those_of_the_reference(softplus, seed):
    inputs = scan_inputs(seed, n=2, d=4, states=1, groups=2, length=11)
    if not softplus:
        inputs = with_positive_steps(inputs)

    def scan(backend, **t):
        return selective_scan(**t, delta_softplus=softplus, backend=backend)

    assert_gradients_follow(scan, on_device(inputs), 1e-5, seed)


@pytest.mark.usefixtures("small_blocks")
def test_float64_stays_float64(seed):
    inputs = on_device(image_inputs(seed, 2, 5, n=1, d=2, states=1), torch.float64)
    assert_cross_scan_follows(inputs, 2, 5, 1e-12, seed)


def test_an_empty_batch_gives_an_empty_answer():
    inputs = on_device(image_inputs(0, 2, 3, n=0))
    assert cross_scan(**inputs, height=2, width=3, backend="triton").shape == (0, 6, 20)


def test_cpu_tensors_are_refused_outside_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ScanUnavailable, match="needs CUDA tensors, not cpu"):
        selective_scan(**scan_inputs(0), backend="triton")


@pytest.mark.parametrize("processors", [1, 132])
def test_one_image_fills_the_chip_and_many_take_long_chunks(processors, monkeypatch):
    monkeypatch.setattr(triton_cuda, "_processors", lambda _: processors)
    for n, length in ((1, 1), (1, 128 * 128), (1, 65536), (8, 65536)):
        chunk = triton_cuda._for_inference(torch.empty(n, length, 4, 96, device="meta"), 2).chunk
        programs = n * 2 * 3 * -(-length // chunk)
        assert chunk == 32 or programs >= 16 * processors
        assert chunk in (32, 64, 128, 256)
    assert chunk == 256


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mtair.scan import triton_gradients, triton_kernels
NARROW = {"u", "dt", "B", "C"}
NUMBERS = {"length", "height", "width", "channels", "states", "groups", "parts", "chunks", "rows"}
BLOCKS = {"CHUNK": 16, "BLOCK_C": 32, "BLOCK_S": 16, "BLOCK_K": 128, "BLOCK_E": 32}
def compile(name, cross, adjoint, narrow, ones):
    kernel = {**vars(triton_kernels), **vars(triton_gradients)}[name]
    fixed = {**BLOCKS, "CROSS": cross, "SOFTPLUS": True, "ADJOINT": adjoint,
             "ACC": triton.language.float32}
    if ones:  # what Triton makes of a map of one pixel: every 1 but an unspecialised one
        fixed |= dict.fromkeys(NUMBERS - {"channels"}, 1)
    def kind(arg):
        if arg in fixed: return "constexpr"
        if arg in NUMBERS: return "i32"
        return "*" + (narrow if arg in NARROW else "fp32")
    signature = {arg: kind(arg) for arg in kernel.arg_names}
    constants = {(kernel.arg_names.index(k),): v for k, v in fixed.items() if k in signature}
    attrs = {(i,): [["tt.divisibility", 16]] for i, k in enumerate(signature.values())
             if k[0] == "*"}
    source = ASTSource(kernel, signature, constants, attrs)
    built = triton.compile(source, GPUTarget("cuda", 90, 32),
                           {"num_warps": 4 if name == "chunk_starts" else 1})
    print(name, built.metadata.shared, len(built.asm["cubin"]) > 0)
compile("chunk_ends", True, 1, "bf16", False)
compile("chunk_starts", True, 1, "fp32", False)
compile("chunk_outputs", True, 0, "bf16", False)
compile("chunk_gradients", True, 0, "fp32", False)
compile("chunk_outputs", False, 0, "fp32", True)
compile("chunk_ends", True, 0, "fp32", True)
"""


def test_the_kernels_compile_for_a_gpu_without_one():
    """In a process of its own: here they are defined for the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    script = [sys.executable, "-c", COMPILE]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    built = [line.split() for line in done.stdout.splitlines()]
    assert len(built) == 6
    # A lane of its own for every channel: no exchange between lanes, so no shared memory.
    walks = [memory for name, memory, _ in built if name in ("chunk_ends", "chunk_outputs")]
    assert walks == ["0"] * 4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("states", [1, 4, 16])
@pytest.mark.parametrize("length", [1000, 16384])
@pytest.mark.usefixtures("gpu")
def test_long_scans_on_a_gpu(length, states, dtype, seed):
    inputs = on_device(scan_inputs(seed, n=1, d=96, states=states, length=length), dtype)
    assert_scan_follows(inputs, TOLERANCE[dtype], seed)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.usefixtures("gpu")
def test_the_fused_kernel_on_a_gpu(dtype, seed):
    inputs = on_device(image_inputs(seed, 64, 64, n=1, d=96, states=16), dtype)
    assert_cross_scan_follows(inputs, 64, 64, 1e-5, seed)
    first = cross_scan(**inputs, height=64, width=64, backend="triton")
    for _ in range(3):
        again = cross_scan(**inputs, height=64, width=64, backend="triton")
        assert torch.equal(again, first), f"seed {seed}: not the same at every run"


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_gradients_of_the_fused_kernel_on_a_gpu(seed):
    def scan(**t):
        return cross_scan(**t, height=24, width=40)

    inputs = on_device(image_inputs(seed, 24, 40, n=2, d=96, states=16))
    assert_gradients_follow(scan, inputs, 1e-4, seed)
