"""How fast the network is here: milliseconds and GMAC/s by size, path and kind of block.

Owns the measurement and its table. Every path is compared with the plain one (float32, NCHW, eager,
the reference scan, nothing fused), measured in the same run.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from mtair import scan
from mtair.blocks import MTDN, SS2D, PromptGenBlock, TransformerBlock
from mtair.checkpoint import CheckpointError, load_model
from mtair.graphs import Graphed
from mtair.machine import machine
from mtair.model import MTAIR, Dimensions

KINDS: dict[type[nn.Module], str] = {
    MTDN: "dual blocks",
    TransformerBlock: "plain blocks",
    PromptGenBlock: "prompt blocks",
}
REST = "stem, resampling, output"
LONG_SECONDS = 10.0  # a first pass this long is the only one: warming up matters little to it

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Row:
    """One network on one path at one size of image. `ms` is None where it did not run."""

    model: str
    width: int
    height: int
    path: str
    """Precision, layout and scan."""
    ms: float | None
    gmac_per_second: float | None
    times_plain: float | None
    """How many times faster than the plain path."""
    ms_by_kind: dict[str, float]
    passes: int
    note: str = ""


def network(name_or_path: str) -> MTAIR:
    """A shipped name, a weights file, or a YAML of dimensions (then the weights are random).

    Raises CheckpointError where it is none of them.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        return load_model(name_or_path)
    try:
        dims = Dimensions.from_dict(yaml.safe_load(path.read_text()))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: not a file of dimensions ({error})") from error
    torch.manual_seed(0)
    return MTAIR(dims).eval()


def multiply_accumulates(dims: Dimensions, height: int, width: int) -> float:
    """GMAC of one image: convolutions, linear maps, attention's products, and 4.5 MAC for each
    state that the scan updates (decay, product, sum, output and half for the exponential)."""
    from torch.utils.flop_counter import FlopCounterMode

    in_scans = 0.0

    def count(ssm: SS2D, x: Tensor) -> Tensor:
        nonlocal in_scans
        rows = ssm.x_proj_weight.shape[1]
        in_scans += 4 * x.numel() * (rows + ssm.dt_rank + 4.5 * ssm.d_state)
        return torch.empty_like(x)

    with torch.device("meta"):
        model = MTAIR(dims)
        for module in model.modules():
            if isinstance(module, SS2D):
                setattr(module, "_scan", lambda x, ssm=module: count(ssm, x))  # noqa: B010
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, height, width))
    return (float(counter.get_total_flops()) / 2 + in_scans) / 1e9


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run the network."""

    label: str
    dtype: torch.dtype
    backend: scan.Backend
    eager: bool
    """NCHW, every operation by itself."""
    graph: bool = False
    """As a CUDA graph, as the pipeline runs it; it cannot be split by kind of block."""


def paths(device: torch.device) -> list[Way]:
    """What is measured on a device, the plain path first, with every scan that it has."""
    chosen = scan.choose("auto", device)
    here = [found.backend for found in scan.explain(device) if found.available]
    others = [backend for backend in here if backend != "reference"]
    return [
        Way("plain: fp32, NCHW, eager, reference scan", torch.float32, "reference", True),
        *(Way(f"fp32, NCHW, eager, {b} scan", torch.float32, b, True) for b in others),
        Way(f"fp32, {chosen} scan", torch.float32, chosen, False),
        Way(f"bf16, {chosen} scan", torch.bfloat16, chosen, False),
        *(
            [Way(f"bf16, {chosen} scan, CUDA graph", torch.bfloat16, chosen, False, graph=True)]
            if device.type == "cuda"
            else []
        ),
    ]


def prepared(name: str, path: Way, device: torch.device) -> MTAIR:
    """The network as the path runs it."""
    model = network(name).to(device, path.dtype).requires_grad_(False)
    for module in model.modules():
        if isinstance(module, SS2D):
            module.scan_backend = path.backend
    if path.eager:
        as_eager(model)
    return model


def bench(
    names: list[str], sizes: list[tuple[int, int]], device: torch.device, runs: int,
    clock: Clock = time.perf_counter,
) -> Iterator[Row]:  # fmt: skip
    """Measure each network at each size (width, height) on each path, one row at a time."""
    for name in names:
        dims = network(name).dims
        for width, height in sizes:
            gmac = multiply_accumulates(dims, height, width)
            image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
            plain_ms: float | None = None
            for way in paths(device):
                plain = way.backend == "reference"
                needed = scan_bytes(dims, height, width) if plain else 0
                if needed > free_memory(device):
                    note = f"not run: its scan needs {needed / 2**30:.0f} GiB"
                    yield Row(name, width, height, way.label, None, None, None, {}, 0, note)
                    continue
                model = prepared(name, way, device)
                try:
                    ms, by_kind, passes = measure(model, image.to(device), runs, clock, way)
                except torch.OutOfMemoryError:
                    note = "out of memory"
                    yield Row(name, width, height, way.label, None, None, None, {}, 0, note)
                    continue
                plain_ms = ms if plain else plain_ms
                yield Row(
                    name, width, height, way.label, ms, gmac / ms * 1e3,
                    plain_ms / ms if plain_ms else None, by_kind, passes,
                )  # fmt: skip


def as_eager(model: MTAIR) -> None:
    """Give every convolution contiguous NCHW maps and weights, as a network written so has them."""

    def contiguous(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        del module
        return tuple(x.contiguous() for x in inputs)

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous()
            module.register_forward_pre_hook(contiguous)


def measure(
    model: MTAIR, image: Tensor, runs: int, clock: Clock, way: Way
) -> tuple[float, dict[str, float], int]:
    """Median milliseconds of a pass, those of each kind of block, and how many were measured."""
    now, between = moments(image.device, clock)
    blocks: list[tuple[str, Any, Any]] = []
    began: Any = None

    def before(module: nn.Module, inputs: Any) -> None:
        del module, inputs
        nonlocal began
        began = now()

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        del inputs, output
        blocks.append((KINDS[type(module)], began, now()))

    run_once: Callable[[Tensor], Tensor] = model
    stream: AbstractContextManager[object] = nullcontext()
    if way.graph:
        run_once = Graphed(model)
        stream = torch.cuda.stream(torch.cuda.Stream(image.device))  # type: ignore[no-untyped-call]
    else:
        for module in model.modules():
            if type(module) in KINDS:
                module.register_forward_pre_hook(before)
                module.register_forward_hook(after)
    model.requires_grad_(False)
    passes: list[dict[str, float]] = []
    for run in range(runs + 1):
        blocks.clear()
        # With gradients on nothing is fused; none is kept, as no parameter asks for one.
        mode = torch.inference_mode() if way.graph else torch.set_grad_enabled(way.eager)
        with stream, mode:
            start = now()
            run_once(image)
            end = now()
        total = between(start, end)
        spent: dict[str, float] = {}
        for kind, first, last in blocks:
            spent[kind] = spent.get(kind, 0.0) + between(first, last)
        long = total > LONG_SECONDS
        if run or long:
            passes.append({**spent, REST: total - sum(spent.values())})
        if long:
            break
    kinds = dict.fromkeys(kind for one in passes for kind in one)
    by_kind = {k: 1e3 * statistics.median(one.get(k, 0.0) for one in passes) for k in kinds}
    ms = 1e3 * statistics.median(sum(one.values()) for one in passes)
    return ms, {} if way.graph else by_kind, len(passes)


def moments(
    device: torch.device, clock: Clock
) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """Takes a moment; gives the seconds between two. A GPU's are marks in its queue of work: a
    block is not waited for before the next one is launched."""
    if device.type != "cuda":
        return clock, lambda start, end: end - start

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def between(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return mark, between


def scan_bytes(dims: Dimensions, height: int, width: int) -> int:
    """What the reference scan keeps at once: decay and drive of every state at the finest scale."""
    pixels = -(-height // dims.stem) * -(-width // dims.stem)
    channels = dims.widths[0] * (2 if dims.wide_dec1 and "dec1" in dims.mamba_stages else 1)
    return int(3 * 4 * pixels * channels * dims.expand * dims.d_state)


def free_memory(device: torch.device) -> int:
    """Bytes that a tensor could take now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def table(rows: list[Row]) -> str:
    """Markdown, the milliseconds split by kind of block."""
    kinds = [*KINDS.values(), REST]
    head = ["model", "size", "path", "ms", "GMAC/s", "times plain", *kinds]
    lines = [" | ".join(head), " | ".join(["---"] * 3 + ["---:"] * (len(head) - 3))]
    for row in rows:
        cells = [row.model, f"{row.width}x{row.height}", row.path]
        if row.ms is None or row.gmac_per_second is None:
            cells += [row.note] + [""] * (len(head) - 4)
        else:
            ratio = f"{row.times_plain:.1f}" if row.times_plain else ""
            cells += [f"{row.ms:.1f}", f"{row.gmac_per_second:.0f}", ratio]
            split = row.ms_by_kind
            cells += [f"{split.get(kind, 0):.1f}" if split else "" for kind in kinds]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def as_json(rows: list[Row], device: torch.device) -> dict[str, Any]:
    """The same for programs."""
    return {"machine": machine(device), "rows": [asdict(row) for row in rows]}
