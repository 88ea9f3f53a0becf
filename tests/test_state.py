"""The state of a run in pieces: whole or refused, never half of one and half of another."""

import json

import pytest
import torch

from mtair import state


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(state, "PIECE_BYTES", 1000)


def values(seed):
    return {"step": seed, "model": {"w": torch.full((999,), float(seed))}}


def pieces(folder):
    return sorted(folder.glob("state-*.bin"))


@pytest.mark.usefixtures("small_pieces")
def test_a_state_comes_back_from_its_pieces(tmp_path):
    state.save(values(7), tmp_path)
    assert len(pieces(tmp_path)) > 3
    assert max(path.stat().st_size for path in pieces(tmp_path)) <= 1000
    got = state.load(tmp_path)
    assert got["step"] == 7
    assert torch.equal(got["model"]["w"], values(7)["model"]["w"])


def test_no_piece_is_larger_than_16_mib(tmp_path):
    state.save({"w": torch.zeros(5 << 20)}, tmp_path)
    assert pieces(tmp_path)[0].stat().st_size == 16 << 20
    assert len(pieces(tmp_path)) == 2
    assert state.load(tmp_path)["w"].shape == (5 << 20,)


def test_a_folder_without_a_state_has_none(tmp_path):
    assert state.load(tmp_path) is None


@pytest.mark.usefixtures("small_pieces")
def test_a_save_replaces_the_pieces_of_the_one_before(tmp_path):
    state.save(values(1), tmp_path)
    before = pieces(tmp_path)
    state.save(values(2), tmp_path)
    assert not set(before) & set(pieces(tmp_path))
    assert state.load(tmp_path)["step"] == 2
    named = json.loads((tmp_path / "state.json").read_text())["pieces"]
    assert named == [path.name for path in pieces(tmp_path)]


@pytest.mark.usefixtures("small_pieces")
def test_a_save_that_breaks_off_leaves_the_state_before(tmp_path, monkeypatch):
    state.save(values(1), tmp_path)
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        state.save(values(2), tmp_path)
    assert state.load(tmp_path)["step"] == 1
    monkeypatch.undo()
    monkeypatch.setattr(state, "PIECE_BYTES", 1000)
    state.save(values(3), tmp_path)  # sweeps what was left of the second
    assert state.load(tmp_path)["step"] == 3
    named = json.loads((tmp_path / "state.json").read_text())["pieces"]
    assert named == [path.name for path in pieces(tmp_path)]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("damage", ["missing", "flipped", "short", "manifest"])
def test_damage_is_refused_in_a_line_that_names_the_file(tmp_path, damage):
    state.save(values(1), tmp_path)
    piece = pieces(tmp_path)[1]
    data = bytearray(piece.read_bytes())
    if damage == "missing":
        piece.unlink()
    elif damage == "flipped":
        data[10] ^= 1
        piece.write_bytes(data)
    elif damage == "short":
        piece.write_bytes(data[:-1])
    else:
        (tmp_path / "state.json").write_text("{")
    with pytest.raises(state.StateError) as caught:
        state.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
