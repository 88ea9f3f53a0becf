"""Weights on disk: what is written comes back, and no damage goes unnoticed."""

import json
import os
import random
import secrets

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mtair import MTAIR, CheckpointError, Dimensions, checkpoint, list_models, load_model
from mtair.checkpoint import describe, save

NANO = Dimensions(
    widths=(4, 4, 8, 8), depths=(1, 0, 0, 1), refinement=0, heads=(1, 1, 2, 2), ffn_expansion=1.0,
    prompt_dims=(2, 2, 2, 2), prompt_sizes=(2, 2, 2, 2), d_state=2, expand=1.0,
)  # fmt: skip
RECORD = {"steps": 3, "data": ["a", "b"]}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return MTAIR(NANO).eval()


@pytest.fixture
def path(model, tmp_path):
    save(model, tmp_path / "nano.safetensors", RECORD)
    return tmp_path / "nano.safetensors"


def assert_refused(path, message):
    """One line that names the file, from both ways of reading it."""
    for read in (load_model, describe):
        with pytest.raises(CheckpointError, match=message) as caught:
            read(str(path))
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def rewrite(path, **metadata):
    """The same tensors under other metadata; None leaves a key out."""
    with safe_open(path, framework="pt") as file:
        known = file.metadata()
    merged = {k: v for k, v in (known | metadata).items() if v is not None}
    save_file(load_file(path), path, merged or None)


@torch.inference_mode()
def test_a_model_comes_back_as_it_was_saved(model, path):
    loaded = load_model(str(path))
    image = torch.rand(1, 3, 17, 23)
    assert torch.equal(loaded(image), model(image))
    assert loaded.dims == NANO
    assert not loaded.training


def test_a_file_says_what_it_is(model, tmp_path):
    path = tmp_path / "some name.safetensors"
    sha256 = save(model, path, RECORD)
    info = describe(str(path))
    assert (info.name, info.path, info.dims, info.record) == ("some name", path, NANO, RECORD)
    assert info.sha256 == sha256
    assert len(sha256) == 64


def test_the_hash_is_of_the_weights_not_of_the_file(model, tmp_path):
    hashes = [save(model, tmp_path / name, {"run": name}) for name in ("a", "b")]
    assert hashes[0] == hashes[1]
    changed = MTAIR(NANO)
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        changed.output.weight[0, 0, 0, 0] += 1e-3
    assert save(changed, tmp_path / "c", {}) != hashes[0]


def test_bfloat16_weights_keep_their_type(model, tmp_path):
    low = MTAIR(NANO)
    low.load_state_dict(model.state_dict())
    save(low.bfloat16(), tmp_path / "low.safetensors", {})
    tensors = load_file(tmp_path / "low.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert describe(str(tmp_path / "low.safetensors")).dims == NANO


def test_others_may_read_what_was_saved(path):
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_file_that_is_not_there(tmp_path):
    assert_refused(tmp_path / "none.safetensors", "no such weights file")


def test_a_directory(tmp_path):
    assert_refused(tmp_path, "no such weights file")


@pytest.mark.parametrize("content", [b"", b"# not weights\n" * 100, b"\xff" * 64])
def test_a_file_of_another_kind(tmp_path, content):
    path = tmp_path / "text.safetensors"
    path.write_bytes(content)
    assert_refused(path, "not a readable safetensors file")


@pytest.mark.parametrize("kept", [4, 0.1, 0.5, 0.99])
def test_a_truncated_file(path, kept):
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    assert_refused(path, "not a readable safetensors file")


def header_bytes(path):
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << random.Random(position).randrange(8)
    path.write_bytes(data)


def hash_or_error(path):
    try:
        return describe(str(path)).sha256
    except CheckpointError as error:
        return str(error)


def test_a_flipped_bit_in_the_tensors(path):
    seed = secrets.randbelow(2**31)
    intact, first = path.read_bytes(), header_bytes(path)
    for position in random.Random(seed).sample(range(first, len(intact)), 20):
        path.write_bytes(intact)
        flip(path, position)
        assert "SHA-256" in hash_or_error(path), f"seed {seed}, byte {position}"


def test_a_flipped_bit_in_the_header_is_noticed_or_harmless(model, path):
    seed = secrets.randbelow(2**31)
    intact, want = path.read_bytes(), describe(str(path)).sha256
    for position in random.Random(seed).sample(range(header_bytes(path)), 300):
        path.write_bytes(intact)
        flip(path, position)
        got = hash_or_error(path)
        refused = str(path) in got and "\n" not in got
        assert got == want or refused, f"seed {seed}, byte {position}: {got}"


def test_weights_of_another_program(path):
    rewrite(path, format="other-2")
    assert_refused(path, "format 'other-2', expected 'mtair-1'")


def test_weights_without_a_description(path):
    rewrite(path, format=None, dims=None, record=None, sha256=None)
    assert_refused(path, "not weights of this network")


@pytest.mark.parametrize("key", ["dims", "record"])
@pytest.mark.parametrize("value", [None, "{", "7", "[1]", "null", '{"widths": 48}'])
def test_a_damaged_description(path, key, value):
    if (key, value) == ("record", '{"widths": 48}'):
        value = '"text"'
    rewrite(path, **{key: value})
    assert_refused(path, "its description is damaged")


@pytest.mark.parametrize("value", [None, "", "0" * 64])
def test_a_hash_that_does_not_match(path, value):
    rewrite(path, sha256=value)
    assert_refused(path, "SHA-256")


def changed_dims(**change):
    return Dimensions.from_dict(NANO.to_dict() | change)


@pytest.mark.parametrize(
    "dims", [changed_dims(d_state=3), changed_dims(depths=(1, 1, 0, 1)), changed_dims(stem=2)]
)
def test_tensors_that_do_not_fit_the_dimensions(path, dims):
    sha256 = checkpoint.fingerprint(load_file(path), dims)
    rewrite(path, dims=json.dumps(dims.to_dict()), sha256=sha256)
    with pytest.raises(CheckpointError, match="tensors do not fit the dimensions") as caught:
        load_model(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_the_known_ones(tmp_path, monkeypatch, model):
    monkeypatch.setattr(checkpoint, "weights_folder", lambda: tmp_path)
    assert_refused("nonesuch", "there are none, or give a path")
    for name in ("b", "a"):
        save(model, tmp_path / f"{name}.safetensors", {})
    assert list_models() == ["a", "b"]
    assert_refused("nonesuch", "there are a, b, or give a path")
    assert describe("a").name == "a"
    assert load_model("b").dims == NANO


def test_every_shipped_model_loads():
    for name in list_models():
        assert load_model(name).dims == describe(name).dims


def test_a_save_that_fails_leaves_the_old_file(model, path, monkeypatch):
    before = path.read_bytes()

    def half(self, data):
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError("no space left")

    monkeypatch.setattr("pathlib.Path.write_bytes", half)
    with pytest.raises(OSError, match="no space left"):
        save(MTAIR(NANO), path, {})
    assert path.read_bytes() == before


def test_a_save_replaces_the_old_file_and_leaves_nothing_beside_it(path):
    save(MTAIR(NANO), path, {"steps": 4})
    assert describe(str(path)).record == {"steps": 4}
    assert list(path.parent.iterdir()) == [path]
