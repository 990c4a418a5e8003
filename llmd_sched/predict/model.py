"""What is published: both targets' base and trees under one version, as a value that survives a trip through bytes."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
from numba import njit
from numpy.typing import NDArray

from llmd_sched.errors import SchedError
from llmd_sched.predict import base
from llmd_sched.predict.base import TargetName
from llmd_sched.predict.features import FEATURES
from llmd_sched.predict.forest import Forest, Trees, no_trees
from llmd_sched.types import Array

MIN_MS = 0.01
MAX_MS = 3_600_000.0
MAX_FACTOR = 20.0
"""The trees correct the base by at most this factor, up or down."""

_MAGIC = b"llmd-sched model 1\n"
_DIGEST_BYTES = 16


class BadModel(SchedError):
    """The bytes are not a model this version can read."""


class Target(msgspec.Struct, frozen=True, eq=False):
    """One fitted target."""

    coefficients: NDArray[np.float64]
    """Of ``base.TTFT_TERMS`` or ``base.TPOT_TERMS``, ms per unit."""
    trees: Trees
    rows: int = 0
    """How many labelled rows it was fitted on."""
    newest_s: float = -np.inf
    """When the newest of them was taken: any later label is news to this fit."""
    held_out_error: float = np.nan
    """Median |log(predicted / measured)| on the newest rows before they were learned; NaN when none were held out."""


class Model(msgspec.Struct, frozen=True, eq=False, dict=True):
    """Predicts both targets for feature rows. Version 0 is a preset that has seen nothing."""

    version: int
    ttft: Target
    tpot: Target
    samples: int = 0
    """Samples its trainer had received when it was fitted."""
    preset: str = "default"
    fitted_at_s: float = 0.0
    features: tuple[str, ...] = FEATURES

    def __post_init__(self) -> None:
        for target, terms in ((self.ttft, base.TTFT_TERMS), (self.tpot, base.TPOT_TERMS)):
            if target.coefficients.shape != (len(terms),):
                raise ValueError(f"the base has the terms {', '.join(terms)}; got {target.coefficients.shape}")

    @cached_property
    def forest(self) -> Forest:
        """Both targets' trees as the kernel's tables, TTFT first. ValueError when they do not fit a row."""
        return Forest([self.ttft.trees, self.tpot.trees], len(self.features))

    @classmethod
    def cold(cls, preset: str = "default") -> Model:
        """The preset's base alone. KeyError for a name that is not in ``base.COLD_START``."""
        start = base.COLD_START[preset]
        ttft, tpot = (Target(np.array(coefficients), no_trees()) for coefficients in (start.ttft, start.tpot))
        return cls(version=0, ttft=ttft, tpot=tpot, preset=preset)

    def target(self, name: TargetName) -> Target:
        return self.ttft if name == "ttft" else self.tpot

    def predict(self, rows: NDArray[np.float64]) -> tuple[Array, Array]:
        """(ttft_ms, tpot_ms), each (n,), for feature rows (n, F); always finite and at least MIN_MS."""
        log_factors = self.forest.predict(rows)
        ttft_ms = _corrected(base.ttft_terms(rows), self.ttft.coefficients, log_factors[0])
        tpot_ms = _corrected(base.tpot_terms(rows), self.tpot.coefficients, log_factors[1])
        return ttft_ms, tpot_ms

    def to_bytes(self) -> bytes:
        """Self-describing and checksummed; read by ``from_bytes``."""
        body = msgspec.msgpack.encode(self, enc_hook=_encode_array)
        return _MAGIC + _digest(body) + body

    @classmethod
    def from_bytes(cls, blob: bytes) -> Model:
        """BadModel for bytes that are foreign, damaged, or of a model with other features."""
        if not blob.startswith(_MAGIC):
            raise BadModel(f"not a model of this format (it should begin with {_MAGIC!r})")
        digest, body = blob[len(_MAGIC) :][:_DIGEST_BYTES], blob[len(_MAGIC) + _DIGEST_BYTES :]
        if _digest(body) != digest:
            raise BadModel("the model is damaged: its checksum does not match")
        try:
            model = msgspec.msgpack.decode(body, type=cls, dec_hook=_decode_array)
        except (msgspec.ValidationError, ValueError) as error:
            raise BadModel(f"the model cannot be read: {error}") from error
        if model.features != FEATURES:
            raise BadModel(f"the model was trained on the features {', '.join(model.features)}")
        try:
            _ = model.forest  # built here, so that a bad table is refused before it is used
        except ValueError as error:
            raise BadModel(f"the model cannot be used: {error}") from error
        return model


_LOG_LIMIT = float(np.log(MAX_FACTOR))


@njit(cache=True, nogil=True)
def _corrected(terms: Any, coefficients: Any, log_factor: Any) -> Any:
    """The base times what the trees say of it, each within its bounds: ``bounded`` of both, row by row."""
    out = np.empty(terms.shape[0])
    for i in range(terms.shape[0]):
        base_ms = 0.0
        for k in range(terms.shape[1]):
            base_ms += terms[i, k] * coefficients[k]
        if not base_ms <= MAX_MS:
            base_ms = MAX_MS
        value_ms = max(base_ms, MIN_MS) * np.exp(min(max(log_factor[i], -_LOG_LIMIT), _LOG_LIMIT))
        out[i] = min(max(value_ms, MIN_MS), MAX_MS)
    return out


def bounded(value_ms: Array) -> Array:
    """``value_ms`` between MIN_MS and MAX_MS, NaN as MAX_MS: an unknown wait is not a short one."""
    return np.fmax(np.fmin(value_ms, MAX_MS), MIN_MS)  # fmin and fmax pass over NaN


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest()


def _encode_array(value: Any) -> tuple[str, bytes]:
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.tobytes()
    raise NotImplementedError(f"cannot encode {type(value).__name__}")


def _decode_array(_kind: type, value: Any) -> NDArray[Any]:
    kind, data = value
    if kind not in ("<i4", "<i8", "<f8", "<u8", "|u1"):
        raise ValueError(f"unexpected array of {kind}")
    return np.frombuffer(data, dtype=kind).copy()
