"""The matrix: what a source has is in the output, or a warning said before that it would not be."""

import pytest
from fidelity import all_cases, run

CASES = all_cases()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_the_source_has_is_kept_or_said_to_be_lost(tmp_path, case):
    if case.needs:
        pytest.skip(case.needs)
    outcome = run(case, tmp_path)
    lost = {name for name, kept in outcome.kept.items() if not kept}
    assert lost - ({"planes"} if not case.lossless else set()) == set(case.loses)
    said = " ".join(outcome.warnings)
    words = {"format": "does not take"}
    assert [name for name in case.loses if words.get(name, name) not in said] == []
    assert ("does not keep" in said) == bool(case.loses - {"format"})


@pytest.mark.parametrize("case", [c for c in CASES if c.group == "pixel format"], ids=str)
def test_strength_0_leaves_every_sample_of_every_format(tmp_path, case):
    assert run(case, tmp_path, strength=0).kept["planes"]
