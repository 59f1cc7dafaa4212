"""Per-head patterns of a model's layers, in MInference's file format.

A file is a JSON list with one object for each layer, which gives each query head its pattern:

    [{"0": ["vertical_and_slash", 1000, 6096, 0.98], "1": ["stream_llm", 100, 800, 0.99], ...}, ...]

name, vertical size, slash size, score. Sizes are tokens; but a "block_sparse" head has a number of
key blocks of 64 tokens in the first place, MInference's unit. ``flexprefill calibrate`` makes one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from flex_prefill.patterns import MInference, MInferenceHead

__all__ = ["LayerPatterns", "find", "load"]

KINDS = {
    "stream_llm": "a_shape",
    "vertical_and_slash": "vertical_slash",
    "block_sparse": "block_sparse",
}
BLOCK_TOKENS = 64  # of a block of a "block_sparse" head
_OWN_FILES = Path(__file__).parent / "calibrations"
_HOW = "flexprefill calibrate --model FOLDER --out FILE.json"


@dataclass(frozen=True)
class LayerPatterns:
    """The pattern of each layer of a model."""

    path: str
    layers: tuple[MInference, ...]

    def of(self, layer: int | None, heads: int) -> MInference:
        """The layer's pattern; ValueError if the file is not of such a model."""
        if layer is None or not 0 <= layer < len(self.layers):
            raise ValueError(f"{self.path}: has {len(self.layers)} layers, not layer {layer}")
        pattern = self.layers[layer]
        if len(pattern.heads) != heads:
            raise ValueError(
                f"{self.path}: is of another model: layer {layer} has {len(pattern.heads)} heads, "
                f"the model {heads}"
            )
        return pattern

    def check(self, layers: int, heads: int) -> None:
        """ValueError unless the file is of a model with so many layers and query heads."""
        if len(self.layers) != layers:
            raise ValueError(
                f"{self.path}: is of another model: it has {len(self.layers)} layers, the model "
                f"{layers}"
            )
        for layer in range(layers):
            self.of(layer, heads)


def find(model_type: str) -> Path:
    """The file of a model type; ValueError that says how to make one if there is none."""
    known = {path.stem: path for path in _OWN_FILES.glob("*.json")}
    if model_type not in known:
        raise ValueError(
            f"minfer: there is no file for model_type {model_type!r}"
            f" (files: {', '.join(sorted(known)) or 'none'}); make one with `{_HOW}` and give it "
            "as path"
        )
    return known[model_type]


def resolve(model_type: str | None, path: str | None) -> LayerPatterns:
    """What ``minfer``'s options stand for."""
    if (model_type is None) == (path is None):
        raise ValueError(
            "minfer: expected either path, a file in MInference's format, or model_type; make a "
            f"file with `{_HOW}`"
        )
    return load(path if path is not None else find(str(model_type)))


def load(path: str | Path) -> LayerPatterns:
    """Reads a file; ValueError naming the layer and head that is not well formed."""
    file = Path(path)
    try:
        changed = file.stat().st_mtime_ns
    except OSError:
        raise ValueError(f"minfer: expected a file at {file}; make one with `{_HOW}`") from None
    return _load(str(file), changed)


@lru_cache(maxsize=8)
def _load(path: str, changed: int) -> LayerPatterns:
    try:
        layers = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: expected JSON: {error}") from None
    if not isinstance(layers, list) or not layers:
        raise ValueError(f"{path}: expected a list with an object for each layer")
    return LayerPatterns(path, tuple(_layer(path, i, layer) for i, layer in enumerate(layers)))


def _layer(path: str, number: int, layer: Any) -> MInference:
    heads = layer if isinstance(layer, dict) else {}
    if not heads or set(heads) != {str(head) for head in range(len(heads))}:
        raise ValueError(f'{path}: layer {number}: expected heads "0", "1", ... each once')
    return MInference(
        tuple(_head(f"{path}: layer {number}, head {h}", heads[str(h)]) for h in range(len(heads)))
    )


def _head(where: str, entry: Any) -> MInferenceHead:
    if not isinstance(entry, Sequence) or isinstance(entry, str) or len(entry) < 3:
        raise ValueError(f"{where}: expected [name, vertical size, slash size, score]")
    name, vertical, slash = entry[:3]
    if name not in KINDS:
        raise ValueError(f"{where}: expected one of {', '.join(KINDS)}, got {name!r}")
    for size in (vertical, slash):
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size < 2**40:
            raise ValueError(f"{where}: expected sizes of at least 0, got {size!r}")
    kind = KINDS[name]
    if kind == "block_sparse":
        vertical *= BLOCK_TOKENS
    return MInferenceHead(kind, vertical, max(slash, 1))


def to_entry(head: MInferenceHead, score: float) -> list[Any]:
    """A head as the file has it."""
    name = next(name for name, kind in KINDS.items() if kind == head.kind)
    vertical = head.vertical_size
    if head.kind == "block_sparse":
        vertical = -(-vertical // BLOCK_TOKENS)
    return [name, vertical, head.slash_size, score]
