"""What survives a restart: the model in use and the window it came from, in one checksummed file.

Times in rows are of a clock that starts anew with the machine, so the file also says what the wall clock read, and
ages are carried over. A file that is damaged, foreign or too old is not used; whoever loads it says so in the log.
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import get_args

import msgspec

from llmd_sched.errors import ConfigError, SchedError
from llmd_sched.predict import blob
from llmd_sched.predict.base import TargetName
from llmd_sched.predict.model import BadModel, Model
from llmd_sched.predict.window import Labelled, Window

MAX_AGE_S = 7 * 86_400.0
"""What was learned a week ago is worth less than a cold start that knows it is one."""
MAX_BYTES = 256 << 20

_log = logging.getLogger(__name__)
_MAGIC = b"llmd-sched predictor state 1\n"


class BadState(SchedError):
    """The file cannot be used; the message says why."""


class _State(msgspec.Struct, frozen=True, eq=False):
    saved_s: float
    """On the clock the rows' times are of."""
    saved_wall_s: float
    """The same moment in seconds since 1970."""
    model: Model
    rows: dict[str, Labelled]


class Restored(msgspec.Struct, frozen=True, eq=False):
    path: Path
    model: Model
    rows: dict[str, Labelled]
    age_s: float

    def window(self) -> Window:
        """BadState when the rows do not fit together."""
        window = Window()
        try:
            for name in get_args(TargetName):
                window.restore(name, self.rows[name])
        except (KeyError, ValueError) as e:
            raise BadState(f"{self.path}: its rows do not fit together: {e}") from None
        return window


def prepare(folder: str, producer: str) -> Path | None:
    """Where the predictor of this name keeps its state; None without a folder, which is made if need be.

    ConfigError when it cannot be written to.
    """
    if not folder:
        return None
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise ConfigError(f"cannot write to {folder}: {e.strerror}", "--predictor-state-dir") from None
    return Path(folder) / file_name(producer)


def file_name(producer: str) -> str:
    """Of the state of one predictor, inside the state directory."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in producer) + ".predictor-state"


def save(path: Path, model: Model, window: Window, now_s: float, wall_s: float) -> None:
    """Replaces the file in one step, so a reader finds the old state or the new, whole. OSError when it cannot."""
    rows: dict[str, Labelled] = {name: window.arrays(name) for name in get_args(TargetName)}
    data = blob.seal(_MAGIC, _State(now_s, wall_s, model, rows))
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def restored(path: Path, now_s: float, wall_s: float) -> Restored | None:
    """``load``, for whoever starts: what was found and what cannot be used is said in the log."""
    try:
        found = load(path, now_s, wall_s)
    except BadState as e:
        _log.warning("the predictor starts cold, its saved state cannot be used: %s", e)
        return None
    if found is not None:
        rows = ", ".join(f"{len(held.y_ms)} {name.upper()}" for name, held in found.rows.items())
        _log.info("restored model %d and %s rows, %.0f s old", found.model.version, rows, found.age_s)
    return found


def load(path: Path, now_s: float, wall_s: float) -> Restored | None:
    """None when there is no such file; BadState when there is one that cannot be used."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise BadState(f"{path}: larger than {MAX_BYTES} bytes")
        state = blob.unseal(_MAGIC, path.read_bytes(), _State)
        state.model.check()
    except FileNotFoundError:
        return None
    except OSError as e:
        raise BadState(f"{path}: {e.strerror}") from None
    except (ValueError, BadModel) as e:
        raise BadState(f"{path}: {e}") from None
    age_s = max(0.0, wall_s - state.saved_wall_s)
    if age_s > MAX_AGE_S:
        raise BadState(f"{path}: saved {age_s / 86_400:.1f} days ago, at most {MAX_AGE_S / 86_400:g} are accepted")
    shift_s = (now_s - age_s) - state.saved_s
    rows = {name: held._replace(at_s=held.at_s + shift_s) for name, held in state.rows.items()}
    return Restored(path, _shifted(state.model, shift_s), rows, age_s)


def _shifted(model: Model, shift_s: float) -> Model:
    ttft, tpot = (
        msgspec.structs.replace(target, newest_s=target.newest_s + shift_s) for target in (model.ttft, model.tpot)
    )
    return msgspec.structs.replace(model, ttft=ttft, tpot=tpot, fitted_at_s=model.fitted_at_s + shift_s)
