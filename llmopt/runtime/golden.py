"""An example with its outputs that every artifact carries: what a device compares itself with.

``golden/example.npz`` holds the inputs and a part of the outputs, ``golden/golden.json`` how to run
them and how far off a device may be. For a decoder the outputs are logits, of some tokens at each
position: the likeliest and others spread over the vocabulary. They come from a prefill and one
step for each token after it, as on the device. For any other model they are elements spread over
each output.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import numpy as np

from llmopt.artifact.fields import Fields
from llmopt.errors import ArtifactError, SourceError, UsageError
from llmopt.interface.arrays import Array
from llmopt.runtime.npz import read_npz, write_npz

FOLDER: Final = "golden"
EXAMPLE: Final = "example.npz"
DESCRIPTION: Final = "golden.json"
SCHEMA: Final = 1
LIKELIEST: Final = 32
SPREAD: Final = 64
ELEMENTS: Final = 8192
_IN: Final = "in."
_OUT: Final = "out."


@dataclass(frozen=True, kw_only=True)
class Golden:
    """How to run the example, and what has to come out.

    Args:
        inputs: Arrays by input name; of a decoder, ``input_ids`` and ``attention_mask`` [B, S],
            and ``pixel_values`` of a vision-language model.
        outputs: Kept part of each output; of a decoder, ``columns`` [B, S, C] int32, tokens by
            falling logit and then others, and ``logits`` [B, S, C] float32.
        scales: The largest magnitude of each output.
        tolerance: Largest error of an output, relative to ``scales``.
        counted: Part of a decoder's tokens that has to keep it.
        prefill: Number of tokens in a decoder's first step; 0 for what runs once.
        text: A text; empty where the artifact takes no text.
        tokens: Tokens of the text.
        producer: The target whose kernels made the outputs.
    """

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    scales: Mapping[str, float]
    tolerance: float = 0.0
    counted: float = 1.0
    prefill: int = 0
    text: str = ""
    tokens: tuple[int, ...] = ()
    producer: str = ""

    @classmethod
    def read(cls, artifact: Path) -> Self | None:
        """Return the example of the artifact at a path; None where it has none.

        Raises:
            ArtifactError: It cannot be read, or is of a schema that is not known.
        """
        path = artifact / FOLDER / DESCRIPTION
        if not path.is_file():
            return None
        try:
            data = Fields(json.loads(path.read_text(encoding="utf-8")), path)
            arrays = read_npz(path.with_name(EXAMPLE))
        except (ValueError, OSError, UsageError, SourceError) as error:
            raise ArtifactError(path.parent, f"its example cannot be read ({error})") from error
        if data.number("schema") != SCHEMA:
            raise ArtifactError(path, f"schema {data.number('schema')}, this reads {SCHEMA}")
        bounds = _numbers(data, "bounds")
        return cls(
            inputs=_starting(arrays, _IN),
            outputs=_starting(arrays, _OUT),
            scales=_numbers(data, "scales"),
            tolerance=bounds.get("tolerance", 0.0),
            counted=bounds.get("counted", 1.0),
            prefill=data.number("prefill"),
            text=data.text("text", ""),
            tokens=data.numbers("tokens"),
            producer=data.text("made_with", ""),
        )

    def write(self, artifact: Path) -> None:
        """Write the example into an artifact; the same example is always the same bytes."""
        folder = artifact / FOLDER
        folder.mkdir(exist_ok=True)
        arrays = {_IN + name: self.inputs[name] for name in sorted(self.inputs)}
        arrays |= {_OUT + name: self.outputs[name] for name in sorted(self.outputs)}
        write_npz(folder / EXAMPLE, arrays, force=True)
        described = {
            "schema": SCHEMA,
            "scales": self.scales,
            "bounds": {"tolerance": self.tolerance, "counted": self.counted},
            "prefill": self.prefill,
            "text": self.text,
            "tokens": self.tokens,
            "made_with": self.producer,
        }
        text = json.dumps(described, sort_keys=True, indent=2, ensure_ascii=False)
        (folder / DESCRIPTION).write_text(f"{text}\n", encoding="utf-8")


def columns_of(logits: Array) -> Array:
    """Return which tokens' logits to keep: [B, S, C] int32, the likeliest first.

    Args:
        logits: [B, S, V].
    """
    size = logits.shape[-1]
    best = np.argsort(-logits, axis=-1, kind="stable")[..., :LIKELIEST].astype(np.int32)
    others = spread(size, SPREAD).astype(np.int32)
    rest = np.broadcast_to(others, (*logits.shape[:-1], others.size))
    return np.concatenate([best, rest], axis=-1)


def kept(output: Array, mask: Array | None) -> Array:
    """Return at most `ELEMENTS` elements of an output [n] float32, padding left out.

    Args:
        output: Any shape.
        mask: [B, S], 1 where a token is real; None where nothing is padded.
    """
    padded = mask is not None and output.ndim > 2 and output.shape[:2] == mask.shape
    flat = (output[mask == 1] if padded else output).reshape(-1).astype(np.float32)
    return flat[spread(flat.size, ELEMENTS)]


def spread(size: int, most: int) -> Array:
    """Return at most ``most`` places, spread evenly over ``size``.

    >>> spread(10, 4).tolist(), spread(2, 4).tolist()
    ([0, 2, 5, 7], [0, 1])
    """
    count = min(size, most)
    return np.arange(count) * size // max(count, 1)


def _numbers(data: Fields, key: str) -> dict[str, float]:
    values = data.mapping(key)
    if not all(isinstance(value, int | float) for value in values.values()):
        raise data.bad(key, "numbers by name")
    return {name: float(value) for name, value in values.items()}


def _starting(arrays: Mapping[str, Array], start: str) -> dict[str, Array]:
    return {name.removeprefix(start): x for name, x in arrays.items() if name.startswith(start)}
