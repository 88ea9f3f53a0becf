"""Who may import whom, as drawn in ARCHITECTURE.md."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "mtair": {"av", "ray", "pipeline", "workers"},
    "workers": {"av", "pipeline"},
    "pipeline": {"torch", "ray", "mtair"},
}


def imports(path: Path) -> set[str]:
    """The dotted names that a file imports, wherever in the file it does so."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    # A relative import (level above 0) cannot leave its package.
    absolute = [node for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return names | {node.module for node in absolute}


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def sources(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert any(packages(path) for path in found), f"{package}/ is missing or empty"
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_package_imports_nothing_from_further_up_or_outside(package):
    for path in sources(package):
        assert not packages(path) & FORBIDDEN[package], path


def test_within_pipeline_only_three_files_know_the_workers():
    knowing = {path.name for path in sources("pipeline") if "workers" in packages(path)}
    assert knowing == {"jobs.py", "pools.py", "part_job.py"}


def test_tiles_know_numpy_and_the_types_alone():
    names = imports(ROOT / "pipeline/tiles.py")
    outside = {name for name in names if name.partition(".")[0] not in sys.stdlib_module_names}
    assert outside == {"numpy", "pipeline.frames"}
