"""One line about the machine, for every table."""

import os
import platform
from pathlib import Path

import torch


def machine() -> str:
    """CPU, cores and the versions that matter."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((x.split(":")[1].strip() for x in info.splitlines() if "model name" in x), "CPU")
    bf16 = "with" if "avx512_bf16" in info else "without"
    return (
        f"{model}, {len(os.sched_getaffinity(0))} cores, {bf16} avx512_bf16; "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
