"""Finished runs in a folder, so that a benchmark of an hour can be interrupted, and continued by other arms.

A run is a function of its task and of the code; a file is named after the task alone and says which commit made it.
Whether what has changed since can matter to it is the reader's to judge: the report lists all commits it is made of.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

R = TypeVar("R", bound=msgspec.Struct)


class Kept(Generic[R]):
    """One file for each run, written when it is whole. ValueError for a file that is something else."""

    def __init__(self, folder: Path, kind: type[R]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._decoder = msgspec.msgpack.Decoder(kind)

    def find(self, task: Any) -> R | None:
        path = self._path(task)
        try:
            return self._decoder.decode(path.read_bytes())
        except FileNotFoundError:
            return None
        except msgspec.DecodeError as error:
            raise ValueError(f"{path} holds no run ({error}); remove it and it is made again") from None

    def keep(self, task: Any, run: R) -> None:
        path = self._path(task)
        partial = path.with_suffix(".partial")
        partial.write_bytes(msgspec.msgpack.encode(run))  # unlike JSON it has a NaN
        partial.replace(path)

    def _path(self, task: Any) -> Path:
        return self._folder / f"{hashlib.sha256(msgspec.json.encode(task)).hexdigest()[:32]}.msgpack"
