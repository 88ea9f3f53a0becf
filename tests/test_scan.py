"""The selective scan: the equations, and every backend of this machine against them."""

import secrets
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scans import gradients, image_inputs, relative, scan_inputs, strided, with_positive_steps
from typer.testing import CliRunner

import mtair
from mtair import scan
from mtair.cli import app
from mtair.scan import ScanUnavailable, choose, cross_scan, explain, selective_scan

ROOT = Path(__file__).parents[1]
LENGTHS = (1, 2, 31, 32, 33, 63, 64, 65, 300)
SIZES = ((1, 1), (1, 7), (7, 1), (2, 16), (3, 11), (7, 9), (8, 8), (5, 13), (15, 20))
FORMS = ("[D,S]", "[N,S,L]", "[N,G,S,L]")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
AGAINST_FLOAT64 = {torch.bfloat16: 1e-2, **TOLERANCE}


@pytest.fixture
def seed() -> int:
    """Fresh inputs at every run; the assertions name the seed that failed."""
    return secrets.randbelow(2**31)


def naive_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """Mamba's equations, one number at a time, in float64."""

    def at(x, i, c, t):
        if x.ndim == 2:
            return x[c]
        if x.ndim == 3:
            return x[i, :, t]
        return x[i, c * x.shape[1] // u.shape[1], :, t]

    y = np.zeros(u.shape)
    for i, c in np.ndindex(*u.shape[:2]):
        h = np.zeros(A.shape[1])
        for t in range(u.shape[2]):
            step = delta[i, c, t] + (0 if delta_bias is None else delta_bias[c])
            step = np.log(1 + np.exp(step)) if delta_softplus else step
            h = np.exp(step * A[c]) * h + step * at(B, i, c, t) * u[i, c, t]
            y[i, c, t] = h @ at(C, i, c, t)
            if D is not None:
                y[i, c, t] += D[c] * u[i, c, t]
            if z is not None:
                y[i, c, t] *= z[i, c, t] / (1 + np.exp(-z[i, c, t]))
    return y


def naive_cross_scan(x, projection, dt_weight, A, dt_bias, D, height, width):
    rank, states = dt_weight.shape[2], A.shape[2]
    low, B, C = np.split(projection, [rank, rank + states], axis=3)
    dt = np.stack([low[:, :, k] @ dt_weight[k].T for k in range(4)], axis=2)
    rows = [r * width + c for r in range(height) for c in range(width)]
    columns = [r * width + c for c in range(width) for r in range(height)]
    y = np.zeros(x.shape)
    for k, path in enumerate([rows, columns, rows[::-1], columns[::-1]]):
        y[:, path] += naive_scan(
            x[:, path].transpose(0, 2, 1), dt[:, path, k].transpose(0, 2, 1), A[k],
            B[:, path, k].transpose(0, 2, 1), C[:, path, k].transpose(0, 2, 1),
            D[k], delta_bias=dt_bias[k], delta_softplus=True,
        ).transpose(0, 2, 1)  # fmt: skip
    return y


def numpy_of(inputs):
    return {name: x.numpy() for name, x in inputs.items()}


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("form_c", FORMS)
@pytest.mark.parametrize("form_b", FORMS)
@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_selective_scan_follows_the_equations(backend, form_b, form_c, softplus, seed):
    inputs = scan_inputs(seed, d=6, length=9, forms=(form_b, form_c))
    if not softplus:
        inputs = with_positive_steps(inputs)
    want = naive_scan(**numpy_of(inputs), delta_softplus=softplus)
    got = selective_scan(**inputs, delta_softplus=softplus, backend=backend)
    assert relative(got, torch.from_numpy(want)) < 1e-12, f"seed {seed}"


@pytest.mark.parametrize("without", ["D", "z", "delta_bias"])
@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_skip_gate_and_bias_may_be_left_out(backend, without, seed):
    inputs = scan_inputs(seed, d=6, length=9)
    del inputs[without]
    want = naive_scan(**numpy_of(inputs), delta_softplus=True)
    got = selective_scan(**inputs, delta_softplus=True, backend=backend)
    assert relative(got, torch.from_numpy(want)) < 1e-12, f"seed {seed}"


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (5, 1), (3, 4), (4, 3)])
@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_cross_scan_walks_rows_columns_and_back(backend, height, width, seed):
    inputs = image_inputs(seed, height, width, d=3, states=2)
    want = naive_cross_scan(**numpy_of(inputs), height=height, width=width)
    got = cross_scan(**inputs, height=height, width=width, backend=backend)
    assert relative(got, torch.from_numpy(want)) < 1e-12, f"seed {seed}"


def exact(inputs):
    return {name: x.double() for name, x in inputs.items()}


def assert_numba_scans_as_the_reference(inputs, seed):
    """In any dtype, against the reference in float64 on the very same numbers."""
    dtype = inputs["u"].dtype
    want = selective_scan(**exact(inputs), delta_softplus=True, backend="reference")
    got = selective_scan(**inputs, delta_softplus=True, backend="numba")
    assert got.dtype == dtype
    assert relative(got.double(), want) < AGAINST_FLOAT64[dtype], f"seed {seed}"


def assert_numba_crosses_as_the_reference(inputs, height, width, seed):
    size = {"height": height, "width": width}
    want = cross_scan(**exact(inputs), **size, backend="reference")
    got = cross_scan(**inputs, **size, backend="numba")
    # bfloat16 in, but float32 inside and out.
    tolerance = TOLERANCE[torch.promote_types(inputs["x"].dtype, torch.float32)]
    assert relative(got.double(), want) < tolerance, f"seed {seed}"


@pytest.mark.parametrize("dtype", AGAINST_FLOAT64, ids=str)
@pytest.mark.parametrize("states", [1, 4, 16])
@pytest.mark.parametrize("length", LENGTHS)
def test_numba_selective_scan_equals_the_reference(length, states, dtype, seed):
    for d, groups in ((48, 1), (18, 2)):
        inputs = scan_inputs(seed, d=d, groups=groups, states=states, length=length, dtype=dtype)
        assert_numba_scans_as_the_reference(inputs, seed)


@pytest.mark.parametrize("dtype", AGAINST_FLOAT64, ids=str)
@pytest.mark.parametrize("states", [1, 4, 16])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_numba_cross_scan_equals_the_reference(height, width, states, dtype, seed):
    inputs = image_inputs(seed, height, width, states=states, dtype=dtype)
    assert_numba_crosses_as_the_reference(inputs, height, width, seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("states", [1, 4, 16])
@pytest.mark.parametrize("length", [1000, 16384])
def test_long_sequences_do_not_drift_from_the_reference(length, states, dtype, seed):
    inputs = scan_inputs(seed, n=1, d=16, groups=1, states=states, length=length, dtype=dtype)
    del inputs["z"]
    assert_numba_scans_as_the_reference(inputs, seed)


@pytest.mark.parametrize("states", [1, 4, 16])
@pytest.mark.parametrize(("height", "width"), [(25, 40), (128, 128)])
def test_a_large_image_does_not_drift_from_the_reference(height, width, states, seed):
    inputs = image_inputs(seed, height, width, n=1, d=16, states=states, dtype=torch.float32)
    assert_numba_crosses_as_the_reference(inputs, height, width, seed)


@pytest.fixture
def mamba_ssm(monkeypatch):
    """Stands in for mamba's package on a machine without a GPU: its one function, by its equations,
    with the names and the order of its arguments."""

    def selective_scan_fn(
        u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
        return_last_state=False,
    ):  # fmt: skip
        assert not return_last_state
        arrays = [None if x is None else x.numpy() for x in (u, delta, A, B, C, D, z, delta_bias)]
        return torch.from_numpy(naive_scan(*arrays, delta_softplus))

    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    interface = sys.modules["mamba_ssm.ops.selective_scan_interface"]
    monkeypatch.setattr(interface, "selective_scan_fn", selective_scan_fn, raising=False)
    monkeypatch.setattr(scan, "_obstacle", lambda backend, device: "")


@pytest.mark.usefixtures("mamba_ssm")
def test_what_mamba_ssm_is_given_makes_the_same_scan(seed):
    inputs = scan_inputs(seed, d=6, length=9)
    want = selective_scan(**inputs, delta_softplus=True, backend="reference")
    got = selective_scan(**inputs, delta_softplus=True, backend="mamba_ssm")
    assert relative(got, want) < 1e-12, f"seed {seed}"
    image = image_inputs(seed, 3, 5, d=3, states=2)
    want = cross_scan(**image, height=3, width=5, backend="reference")
    got = cross_scan(**image, height=3, width=5, backend="mamba_ssm")
    assert relative(got, want) < 1e-12, f"seed {seed}"


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("states", [1, 4, 16])
def test_mamba_ssm_equals_the_reference_on_a_gpu(states, seed):
    pytest.importorskip("selective_scan_cuda")
    image = image_inputs(seed, 25, 40, n=1, d=48, states=states, dtype=torch.float32)
    image = {name: x.cuda() for name, x in image.items()}
    want = cross_scan(**exact(image), height=25, width=40, backend="reference")
    got = cross_scan(**image, height=25, width=40, backend="mamba_ssm")
    assert relative(got.double(), want) < 1e-5, f"seed {seed}"


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_memory_layout_does_not_matter(backend, seed):
    inputs = with_positive_steps(scan_inputs(seed))
    scattered = {name: strided(x) for name, x in inputs.items()}
    assert not scattered["A"].is_contiguous()
    want = selective_scan(**inputs, backend=backend)
    assert relative(selective_scan(**scattered, backend=backend), want) < 1e-12, f"seed {seed}"
    inputs = image_inputs(seed, 3, 5)
    scattered = {name: strided(x) for name, x in inputs.items()}
    want = cross_scan(**inputs, height=3, width=5, backend=backend)
    got = cross_scan(**scattered, height=3, width=5, backend=backend)
    assert relative(got, want) < 1e-12, f"seed {seed}"


def test_the_reference_takes_bfloat16_but_not_inside(seed):
    low = scan_inputs(seed, length=300, dtype=torch.bfloat16)
    want = selective_scan(**exact(low), delta_softplus=True, backend="reference")
    got = selective_scan(**low, delta_softplus=True, backend="reference")
    assert got.dtype == torch.bfloat16
    assert relative(got.double(), want) < 1e-2, f"seed {seed}"
    low = {name: x.bfloat16() for name, x in image_inputs(seed, 20, 30).items()}
    want = cross_scan(**exact(low), height=20, width=30, backend="reference")
    got = cross_scan(**low, height=20, width=30, backend="reference")
    assert got.dtype == torch.float32
    assert relative(got.double(), want) < 1e-5, f"seed {seed}"


@pytest.mark.parametrize("decay", [-1e3, -1e12, -1e30])
@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_cross_scan_forgets_at_once_without_nan_or_slow_floats(backend, decay, seed):
    inputs = image_inputs(seed, 40, 50, n=1, dtype=torch.float32)
    inputs["dt_bias"] = inputs["dt_bias"].abs() + 20  # steps of some 20
    size = {"height": 40, "width": 50, "backend": backend}
    gentle = cpu_seconds(lambda: cross_scan(**inputs, **size))
    inputs["A"] = torch.full_like(inputs["A"], decay)
    got = cross_scan(**inputs, **size)
    low, B, C = torch.split(inputs["projection"].double(), [3, 4, 4], dim=3)
    step = torch.einsum("nlkr,kdr->nlkd", low, inputs["dt_weight"].double()) + inputs["dt_bias"]
    step = torch.nn.functional.softplus(step)
    now = (step * (B * C).sum(3, keepdim=True)).sum(2) + inputs["D"].double().sum(0)
    assert relative(got.double(), now * inputs["x"]) < 1e-5, f"seed {seed}"
    # A scan whose states are denormal takes ten times as long.
    assert cpu_seconds(lambda: cross_scan(**inputs, **size)) < 4 * gentle


@pytest.mark.usefixtures("one_thread")
def test_states_that_fade_out_take_no_longer(seed):
    """Below 2**-126 a float is denormal, and a processor may take ten times as long for each."""
    image = image_inputs(seed, 60, 64, n=1, d=32, states=16, dtype=torch.float32)
    image["A"] = torch.full_like(image["A"], -1e-4)
    sequence = scan_inputs(seed, n=1, d=32, states=16, length=3840, groups=1, dtype=torch.float32)
    del sequence["z"], sequence["D"]
    sequence["A"] = torch.full_like(sequence["A"], -1e-4)

    def seconds(scale):
        faint = {**image, "x": image["x"] * scale}
        weak = {**sequence, "u": sequence["u"] * scale}
        return (
            cpu_seconds(lambda: cross_scan(**faint, height=60, width=64, backend="numba")),
            cpu_seconds(lambda: selective_scan(**weak, delta_softplus=True, backend="numba")),
        )

    for full, faded in zip(seconds(1.0), seconds(1e-41), strict=True):
        assert faded < 1.4 * full, f"seed {seed}"


def cpu_seconds(function):
    """Of this process, so that others do not count; the least of twenty."""
    times = []
    for _ in range(20):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("decay", [-1e3, -1e12, -1e30])
@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_a_state_that_decays_at_once_is_forgotten_without_nan(backend, decay, dtype, seed):
    inputs = scan_inputs(seed, d=5, length=70, groups=1, dtype=dtype)
    del inputs["z"], inputs["D"], inputs["delta_bias"]
    inputs["A"] = torch.full_like(inputs["A"], decay)
    inputs["delta"] = inputs["delta"].abs() + 1
    for x in inputs.values():
        x.requires_grad_()
    got = selective_scan(**inputs, backend=backend)
    now = (inputs["B"] * inputs["C"]).sum(2)
    want = inputs["delta"] * inputs["u"] * now
    assert relative(got, want) < TOLERANCE[dtype], f"seed {seed}"
    got.sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs.values()), f"seed {seed}"


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("forms", [("[D,S]", "[N,S,L]"), ("[N,G,S,L]", "[N,G,S,L]")])
def test_gradients_of_numba_selective_scan_are_the_numerical_ones(forms, softplus, seed):
    inputs = scan_inputs(seed, n=1, d=4, states=2, length=4, groups=2, forms=forms)
    if not softplus:
        inputs = with_positive_steps(inputs)
    tensors = tuple(x.requires_grad_() for x in inputs.values())
    torch.manual_seed(seed)
    assert torch.autograd.gradcheck(
        lambda *t: selective_scan(*t, delta_softplus=softplus, backend="numba"), tensors
    ), f"seed {seed}"


def test_gradients_of_numba_cross_scan_are_the_numerical_ones(seed):
    inputs = image_inputs(seed, 2, 3, n=1, d=3, states=2)
    tensors = tuple(x.requires_grad_() for x in inputs.values())
    torch.manual_seed(seed)
    assert torch.autograd.gradcheck(
        lambda *t: cross_scan(*t, height=2, width=3, backend="numba"), tensors
    ), f"seed {seed}"


def assert_same_gradients(got, want, tolerance, seed):
    for name in want:
        assert relative(got[name], want[name]) < tolerance, f"{name}, seed {seed}"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-11)])
@pytest.mark.parametrize("length", [1, 32, 33, 65, 150])
def test_gradients_of_numba_equal_those_of_the_reference(length, dtype, tolerance, seed):
    inputs = scan_inputs(seed, length=length, d=36, dtype=dtype)
    weights = torch.randn(inputs["u"].shape, generator=torch.Generator().manual_seed(seed))

    def run(backend):
        def scan(**t):
            return selective_scan(**t, delta_softplus=True, backend=backend)

        return gradients(scan, inputs, weights.to(dtype))

    assert_same_gradients(run("numba"), run("reference"), tolerance, seed)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-11)])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (4, 8), (5, 13), (9, 11)])
def test_gradients_of_numba_cross_scan_equal_those_of_the_reference(
    height, width, dtype, tolerance, seed
):
    inputs = image_inputs(seed, height, width, dtype=dtype)
    weights = torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(seed))

    def run(backend):
        def scan(**t):
            return cross_scan(**t, height=height, width=width, backend=backend)

        return gradients(scan, inputs, weights.to(dtype))

    assert_same_gradients(run("numba"), run("reference"), tolerance, seed)


def test_threads_may_scan_at_the_same_time(seed):
    inputs = image_inputs(seed, 15, 20, dtype=torch.float32)

    def scan(_):
        return cross_scan(**inputs, height=15, width=20, backend="numba")

    alone = scan(0)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(y, alone) for y in pool.map(scan, range(16))), f"seed {seed}"


def test_the_scan_leaves_the_number_of_threads_of_torch():
    """In a process of its own: the first scan starts Numba's threads."""
    script = (
        "import torch; from mtair.scan import selective_scan; torch.set_num_threads(1);"
        "x = torch.ones(1, 16, 4); selective_scan(x, x, -x[0], x[0], x[0], backend='numba');"
        "raise SystemExit(torch.get_num_threads())"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
    assert done.returncode == 1


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_an_empty_batch_gives_an_empty_answer(backend):
    inputs = image_inputs(0, 2, 3, n=0)
    assert cross_scan(**inputs, height=2, width=3, backend=backend).shape == (0, 6, 20)


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("delta", (2, 12, 39), r"u and delta must be \[N, D, L\]"),
        ("A", (11, 4), "A"),
        ("A", (12,), "A"),
        ("B", (2, 3, 5, 40), "B must be"),
        ("B", (1, 3, 4, 40), "B must be"),
        ("B", (2, 5, 4, 40), "5 groups do not divide 12 channels"),
        ("C", (2, 4, 39), "C must be"),
        ("C", (12, 3), "C must be"),
        ("D", (11,), "D must be"),
        ("z", (2, 12, 1), "z must be"),
        ("delta_bias", (1,), "delta_bias must be"),
    ],
)
def test_a_shape_that_does_not_fit_is_named(backend, name, shape, message):
    inputs = scan_inputs(0)
    inputs[name] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        selective_scan(**inputs, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("name", ["projection", "dt_weight", "A", "dt_bias", "D"])
def test_cross_scan_refuses_shapes_that_do_not_fit(backend, name):
    inputs = image_inputs(0, 3, 5)
    inputs[name] = inputs[name][:-1]
    with pytest.raises(ValueError, match="of 3x5 pixels needs"):
        cross_scan(**inputs, height=3, width=5, backend=backend)
    with pytest.raises(ValueError, match="of 4x5 pixels needs"):
        cross_scan(**image_inputs(0, 3, 5), height=4, width=5, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("name", ["A", "B", "C"])
def test_complex_coefficients_are_refused(backend, name):
    inputs = scan_inputs(0)
    inputs[name] = inputs[name].to(torch.complex128)
    with pytest.raises(ValueError, match="complex A, B or C are not supported"):
        selective_scan(**inputs, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_an_empty_sequence_is_refused(backend):
    with pytest.raises(ValueError, match="the sequence is empty"):
        selective_scan(**scan_inputs(0, length=0), backend=backend)
    with pytest.raises(ValueError, match="of 0x5 pixels"):
        cross_scan(**image_inputs(0, 0, 5), height=0, width=5, backend=backend)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("numba", "pip install numba"),
        ("mamba_ssm", "pip install mamba-ssm"),
        ("triton", "pip install triton"),
    ],
)
def test_a_backend_that_this_machine_cannot_have_says_what_to_do(backend, message, monkeypatch):
    monkeypatch.setattr(scan, "_has", lambda _: False)
    with pytest.raises(ScanUnavailable, match=message):
        selective_scan(**scan_inputs(0), backend=backend)
    with pytest.raises(ScanUnavailable, match=message):
        cross_scan(**image_inputs(0, 2, 2), height=2, width=2, backend=backend)


def test_numba_is_for_the_cpu_alone():
    assert choose("auto", torch.device("cpu")) == "numba"
    with pytest.raises(ScanUnavailable, match="not on cuda"):
        choose("numba", torch.device("cuda"))


@pytest.mark.parametrize(
    ("device", "installed", "chosen"),
    [
        ("cpu", {"numba", "triton"}, "numba"),
        ("cpu", {"triton"}, "reference"),
        ("cuda", {"numba", "triton", "mamba_ssm", "selective_scan_cuda"}, "triton"),
        ("cuda", {"mamba_ssm", "selective_scan_cuda"}, "mamba_ssm"),
        ("cuda", {"mamba_ssm"}, "reference"),
        ("cuda", set(), "reference"),
        ("mps", {"numba", "triton"}, "reference"),
    ],
)
def test_auto_takes_the_fastest_that_is_there(device, installed, chosen, monkeypatch):
    monkeypatch.setattr(scan, "_has", lambda module: module in installed)
    assert choose("auto", torch.device(device)) == chosen
    found = {each.backend: each for each in explain(torch.device(device))}
    assert set(found) == {"reference", "numba", "triton", "mamba_ssm"}
    assert next(each.backend for each in found.values() if each.available) == chosen
    assert all(each.why for each in found.values())


def test_the_slow_reference_is_announced_once(monkeypatch, caplog):
    monkeypatch.setattr(scan, "_has", lambda _: False)
    scan._warn_slow.cache_clear()
    inputs = image_inputs(0, 2, 2)
    for _ in range(3):
        cross_scan(**inputs, height=2, width=2)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "mtair doctor" in caplog.text
    scan._warn_slow.cache_clear()


def test_the_network_runs_with_torch_alone():
    """On a machine without Numba, Triton, PyAV and Ray, in a process of its own."""
    script = (
        "import sys; sys.modules |= dict.fromkeys(('numba', 'triton', 'av', 'ray'));"
        "import torch; from mtair.blocks import SS2D;"
        "assert SS2D(8, 2, 1.0)(torch.ones(1, 8, 3, 4)).isfinite().all()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "the slow reference runs" in done.stderr


@pytest.mark.parametrize("given", [False, True])
def test_kernels_are_compiled_where_no_folder_can_be_written_to(tmp_path, given):
    """As in a container with a read-only file system and a user without a home."""
    shutil.copytree(Path(mtair.__file__).parent, tmp_path / "mtair",
                    ignore=shutil.ignore_patterns("__pycache__", "weights"))  # fmt: skip
    for folder in ("mtair", "mtair/scan"):
        (tmp_path / folder / "__pycache__").touch()
    code = "from mtair import fused_kernels; import numba; print(numba.config.CACHE_DIR)"
    chosen = {"NUMBA_CACHE_DIR": str(tmp_path / "kernels")} if given else {}
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], capture_output=True, text=True, cwd=tmp_path,
        env={"PATH": "", "HOME": "/dev/null", "TMPDIR": str(tmp_path), **chosen},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if given:
        assert (done.stdout.strip(), done.stderr) == (chosen["NUMBA_CACHE_DIR"], "")
    else:
        assert Path(done.stdout.strip()).parent == tmp_path
        assert "set NUMBA_CACHE_DIR" in done.stderr
        assert not Path(done.stdout.strip()).exists()


def test_doctor_says_which_scan_and_why(monkeypatch):
    monkeypatch.setattr(scan, "_has", lambda module: module in ("numba", "mamba_ssm"))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert torch.__version__ in result.output
    assert "scan on cpu: numba" in result.output
    assert "scan on cuda: reference" in result.output
    lines = [line.split(maxsplit=2) for line in result.output.splitlines() if line[:2] == "  "]
    said = [(found, backend) for found, backend, _ in lines]
    assert said[:4].count(("yes", "numba")) == 1
    assert ("no", "mamba_ssm") in said[4:]
    assert ("no", "triton") in said[4:]
    assert any("pip install triton" in why for *_, why in lines)
    if not torch.cuda.is_available():
        assert "cuda: no device" in result.output
