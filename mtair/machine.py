"""Owns what is said of the machine that the network runs on: its name, and what it computes in."""

import platform
from pathlib import Path

import torch


def machine(device: torch.device) -> str:
    """One line about what the figures were measured on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        model = (line.split(":")[1].strip() for line in lines if "model name" in line)
        name = f"{next(model, platform.processor())}, {torch.get_num_threads()} threads"
    return f"{name}; Python {platform.python_version()}, torch {torch.__version__}"


def cpu_computes_bf16() -> bool:
    """Whether this processor has bfloat16 products; else they are emulated, slower than float32."""
    has = torch.cpu.get_capabilities()
    return any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last is ARM's
