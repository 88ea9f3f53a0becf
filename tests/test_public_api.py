"""What this project promises to those who import it."""

import subprocess
import sys
from pathlib import Path

import pytest

import mtair
import pipeline
from mtair import scan


def test_exported_names():
    assert set(pipeline.__all__) == {
        "RestoreConfig", "RestoreError", "__version__", "restore_batch", "restore_file",
        "restore_stream",
    }  # fmt: skip
    assert {"MTAIR", "CheckpointError", "list_models", "load_model"} <= set(mtair.__all__)
    assert {"selective_scan", "cross_scan"} <= set(scan.__all__)
    assert all(hasattr(pipeline, name) for name in pipeline.__all__)
    assert all(hasattr(mtair, name) for name in mtair.__all__)


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_weights_ship_with_a_card_that_is_theirs_and_restore_any_size(name):
    import torch

    from mtair.checkpoint import describe

    assert name in mtair.list_models()
    card = (Path(mtair.__file__).parent / f"weights/{name}.md").read_text()
    assert describe(name).sha256 in card
    model = mtair.load_model(name)
    assert not model.training
    with torch.inference_mode():
        out = model(torch.rand(2, 3, 33, 47))
    assert out.shape == (2, 3, 33, 47)


def test_importing_the_pipeline_loads_neither_torch_nor_ray():
    code = "import sys, pipeline; print([m for m in ('torch', 'ray', 'av') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
