"""The importer of the authors' Lightning checkpoint, on files made up from what is known of it."""

from collections import OrderedDict

import pytest
import torch
import yaml
from typer.testing import CliRunner

from mtair import MTAIR, CheckpointError, Dimensions, load_model
from mtair.cli import app
from mtair.upstream import DEAD, import_checkpoint

NANO = Dimensions(
    widths=(4, 4, 8, 8), depths=(1, 1, 0, 1), refinement=1, heads=(1, 1, 2, 2), ffn_expansion=1.0,
    prompt_dims=(2, 2, 2, 2), prompt_sizes=(2, 2, 2, 2), d_state=2, expand=1.0,
    mamba_stages=("enc1", "dec2"),
)  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    return MTAIR(NANO).eval()


def write(path, model, *, change=lambda tensors: None):
    """As Lightning writes: names under `net.`, the scan under a name of its own, dead layers."""
    tensors = {
        f"net.{name.replace('.ssm.', '.attn2.')}": value
        for name, value in model.state_dict().items()
    }
    tensors |= {f"net.{name}": torch.zeros(2, 2, 1, 1) for name in DEAD}
    change(tensors)
    content = {
        "epoch": 3, "global_step": 7, "pytorch-lightning_version": "2.0.1",
        "state_dict": OrderedDict(tensors), "loops": {}, "optimizer_states": [{"state": {}}],
    }  # fmt: skip
    torch.save(content, path)
    return path


@torch.inference_mode()
def test_a_file_with_every_name_known_becomes_weights(model, tmp_path):
    """The stages of the scan are read from the file, whatever was expected."""
    path = write(tmp_path / "model.ckpt", model)
    target = tmp_path / "out.safetensors"
    expected = Dimensions.from_dict(NANO.to_dict() | {"mamba_stages": ["enc2"]})
    report = import_checkpoint(path, target, expected)
    assert report.complete
    assert report.dims == NANO
    assert len(report.matched) == len(model.state_dict())
    assert "encoder_level1.0.attn2.Ds -> encoder_level1.0.ssm.Ds" in report.renamed
    assert set(report.dead) == DEAD
    image = torch.rand(1, 3, 16, 16)
    assert torch.equal(load_model(str(target))(image), model(image))


def test_the_dead_layers_are_the_six_of_the_released_class():
    assert sorted(DEAD) == [
        "chnl_reduce1.weight", "chnl_reduce2.weight", "chnl_reduce3.weight",
        "reduce_noise_channel_1.weight", "reduce_noise_channel_2.weight",
        "reduce_noise_channel_3.weight",
    ]  # fmt: skip


def rename_fusion(tensors):
    for name in [n for n in tensors if n.endswith(".fuse.weight")]:
        tensors[name.replace("fuse", "aggregate")] = tensors.pop(name)


def drop_output(tensors):
    del tensors["net.output.weight"]


def reshape_bank(tensors):
    tensors["net.prompt1.prompt_param"] = torch.zeros(1, 5, 2, 8, 8)


def outside_the_network(tensors):
    tensors["loss_fn.weight"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "listed"),
    [
        (rename_fusion, ["encoder_level1.0.aggregate.weight (4, 8, 1, 1)",
                         "encoder_level1.0.fuse.weight (4, 8, 1, 1)"]),
        (drop_output, ["output.weight"]),
        (reshape_bank, ["prompt1.prompt_param (1, 5, 2, 8, 8), expected (1, 5, 2, 2, 2)"]),
        (outside_the_network, ["loss_fn.weight (3,)"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_listed_and_nothing_is_written(model, tmp_path, change, listed):
    path = write(tmp_path / "model.ckpt", model, change=change)
    target = tmp_path / "out.safetensors"
    report = import_checkpoint(path, target, NANO)
    assert not report.complete
    for line in listed:
        assert line in str(report)
    assert not target.exists()


class Payload:
    def __reduce__(self):
        return (print, ("this ran",))


@pytest.mark.parametrize("kind", ["absent", "text", "object", "list", "no state_dict"])
def test_a_file_that_is_no_checkpoint_is_refused_in_a_line(tmp_path, capsys, kind):
    path = tmp_path / "model.ckpt"
    if kind == "text":
        path.write_text("no weights")
    elif kind == "object":
        torch.save({"state_dict": {}, "callbacks": Payload()}, path)
    elif kind != "absent":
        torch.save([1] if kind == "list" else {"weights": {}}, path)
    with pytest.raises(CheckpointError) as caught:
        import_checkpoint(path, tmp_path / "out.safetensors", NANO)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "this ran" not in capsys.readouterr().out


def test_the_command_reports_and_says_by_its_exit_code_whether_it_wrote(model, tmp_path):
    shape = tmp_path / "nano.yaml"
    shape.write_text(yaml.safe_dump(lists(NANO.to_dict())))
    good = write(tmp_path / "good.ckpt", model)
    bad = write(tmp_path / "bad.ckpt", model, change=rename_fusion)
    for path, code in ((good, 0), (bad, 2)):
        target = tmp_path / f"{path.stem}.safetensors"
        arguments = ["import-checkpoint", str(path), str(target), "--model", str(shape)]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == code, result.output
        assert target.exists() == (code == 0)


def lists(values):
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
