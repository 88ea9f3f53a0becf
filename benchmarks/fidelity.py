"""The fidelity matrix as docs/fidelity.md shows it: the cases that tests/test_fidelity.py asserts.

    python benchmarks/fidelity.py

Each case is a small clip of noise through a whole job (decode, tiles, colour, window, encode, mux)
with a network that corrects nothing. `=` is: equal before and after. Words instead of it name what
the output does not keep, as a warning says before anything is restored; `lossy` stands for the
samples of an encoder that is not asked to be exact. Anything else would be printed as DIFFERS.
"""

import logging
import platform
import sys
import tempfile
from itertools import groupby
from pathlib import Path

import av

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from fidelity import Case, Outcome, all_cases, run

COLUMNS = {
    "times": ("times",), "samples": ("planes",), "format": ("format",),
    "colour tags": ("matrix", "range", "primaries", "transfer"), "chroma site": ("chroma site",),
    "HDR10": ("mastering display", "light level"),
    "shape": ("size", "aspect", "rotation, mirror"),
}  # fmt: skip


def cells(case: Case, outcome: Outcome) -> tuple[str, ...]:
    """One row of the table without its name."""
    row = []
    for names in COLUMNS.values():
        lost = [name for name in names if not outcome.kept[name]]
        if lost == ["planes"] and not case.lossless:
            row.append("lossy")
        elif set(lost) <= set(case.loses):
            row.append(f"not {', '.join(lost)}" if lost else "=")
        else:
            row.append("DIFFERS")
    return tuple(row)


def short(names: list[str]) -> str:
    """`a, x` and `b, x` as `a; b → x`."""
    by_output: dict[str, list[str]] = {}
    for name in names:
        what, _, where = name.rpartition(", ")
        by_output.setdefault(where if what else "", []).append(what or where)
    outputs: dict[str, list[str]] = {}
    for where, whats in by_output.items():
        outputs.setdefault("; ".join(whats), []).append(where)
    return "<br>".join(
        whats + (f" → {', '.join(places)}" if any(places) else "")
        for whats, places in outputs.items()
    )


def main() -> None:
    """Print the table, rows of the same outcome in one."""
    logging.disable(logging.CRITICAL)
    print(f"Python {platform.python_version()}, PyAV {av.__version__}, FFmpeg "
          f"{av.ffmpeg_version_info}\n")  # fmt: skip
    print(f"| group | cases | {' | '.join(COLUMNS)} |")
    print("| --- " * (len(COLUMNS) + 2) + "|")
    n_cases = 0
    for group, cases in groupby(all_cases(), key=lambda case: case.group):
        rows: dict[tuple[str, ...], list[str]] = {}
        for case in cases:
            n_cases += 1
            if case.needs:
                rows.setdefault((case.needs,) * len(COLUMNS), []).append(case.name)
                continue
            with tempfile.TemporaryDirectory() as folder:
                outcome = run(case, Path(folder))
            rows.setdefault(cells(case, outcome), []).append(case.name)
        for row, names in rows.items():
            print(f"| {group} | {short(names)} | {' | '.join(row)} |", flush=True)
    print(f"\n{n_cases} cases")


if __name__ == "__main__":
    main()
