from pathlib import Path

import numpy as np
import pytest

from llmd_sched.predict import features as f
from llmd_sched.predict import state
from llmd_sched.predict.gate import next_model
from llmd_sched.predict.model import Model
from llmd_sched.predict.window import Window
from llmd_sched.types import Sample

WALL_S = 1_700_000_000.0


def window(count: int = 120) -> Window:
    made, rng = Window(), np.random.default_rng(4)
    for number in range(count):
        row = np.zeros(len(f.FEATURES))
        row[f.INPUT] = row[f.UNCACHED] = rng.uniform(50, 4000)
        ttft_ms = 30.0 + 0.05 * row[f.UNCACHED]
        made.add(Sample(tuple(row.tolist()), ttft_ms, 10.0, 0.0, 0.0, 0, 100.0 + number, endpoint=f"e{number % 2}"))
    return made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / state.file_name("predicted-latency-producer")


def learned(held: Window) -> Model:
    model = next_model(held, None, version=5, now_s=220.0, classes=("", "H100"))
    assert model is not None
    return model


def test_model_and_window_come_back_with_their_ages(path: Path) -> None:
    held = window()
    model = learned(held)
    state.save(path, model, held, now_s=230.0, wall_s=WALL_S)
    found = state.load(path, now_s=7.0, wall_s=WALL_S + 60.0)  # another boot, a minute later
    assert found is not None
    assert (found.model.version, found.model.classes, found.age_s) == (5, ("", "H100"), 60.0)
    rows = held.arrays("ttft").X[:5]
    assert (found.model.predict(rows)[0] == model.predict(rows)[0]).all()
    ours, theirs = held.arrays("ttft"), found.window().arrays("ttft")
    assert (theirs.X == ours.X).all()
    assert [theirs.endpoints[i] for i in theirs.endpoint] == [ours.endpoints[i] for i in ours.endpoint]
    np.testing.assert_allclose(7.0 - theirs.at_s, 230.0 - ours.at_s + 60.0)
    assert 7.0 - found.model.fitted_at_s == pytest.approx(230.0 - 220.0 + 60.0)


def test_no_file_is_no_error(path: Path) -> None:
    assert state.load(path, 0.0, WALL_S) is None


def test_a_cold_model_with_an_empty_window_can_be_kept_too(path: Path) -> None:
    state.save(path, Model.cold(), Window(), 1.0, WALL_S)
    found = state.load(path, 1.0, WALL_S)
    assert found is not None
    assert found.window().size("ttft") == 0


@pytest.mark.parametrize("damage", ["cut", "flip", "foreign", "empty", "other version"])
def test_a_file_that_is_damaged_or_foreign_is_refused_by_name(path: Path, damage: str) -> None:
    held = window()
    state.save(path, learned(held), held, 230.0, WALL_S)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 4
    broken = {
        "cut": data[:-20],
        "flip": data,
        "foreign": b"\x80\x04\x95pickle",
        "empty": b"",
        "other version": data.replace(b"state 1", b"state 9", 1),
    }
    path.write_bytes(bytes(broken[damage]))
    with pytest.raises(state.BadState, match="predicted-latency-producer"):
        state.load(path, 230.0, WALL_S)


def test_a_state_of_last_week_is_stale(path: Path) -> None:
    state.save(path, Model.cold(), Window(), 1.0, WALL_S)
    with pytest.raises(state.BadState, match=r"saved 8\.0 days ago, at most 7"):
        state.load(path, 1.0, WALL_S + 8 * 86_400)


def test_a_clock_set_back_makes_no_rows_of_the_future(path: Path) -> None:
    state.save(path, Model.cold(), window(), 230.0, WALL_S)
    found = state.load(path, 230.0, WALL_S - 3600.0)
    assert found is not None
    assert found.age_s == 0.0


def test_a_save_that_fails_leaves_the_old_file_and_no_scratch(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state.save(path, Model.cold(), Window(), 1.0, WALL_S)
    before = path.read_bytes()

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        state.save(path, Model.cold(), window(), 2.0, WALL_S)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_the_name_of_a_producer_cannot_leave_the_folder() -> None:
    assert state.file_name("../../etc/x y") == ".._.._etc_x_y.predictor-state"
