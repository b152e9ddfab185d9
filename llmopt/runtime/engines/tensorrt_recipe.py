"""What TensorRT needs to build an engine, as a value: ``build.json`` of an artifact.

It is enough to build the engine on a machine that has neither the source nor the compiler: the
typed network, the sizes that it has to serve, and for which GPUs.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from llmopt.artifact.fields import Fields
from llmopt.errors import ArtifactError

NETWORK: Final = "network.onnx"
WEIGHTS: Final = "network.onnx.data"
RECIPE: Final = "build.json"
GOLDEN: Final = "golden.npz"

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class InputRange:
    """The sizes that an input may have.

    Args:
        least: The smallest of each dimension.
        best: Sizes that kernels are optimized for.
        most: The largest.
    """

    least: Sizes
    best: Sizes
    most: Sizes

    def holds(self, sizes: Sizes) -> bool:
        """Whether ``sizes`` are within.

        >>> InputRange((1, 1), (1, 8), (2, 16)).holds((2, 17))
        False
        """
        return len(sizes) == len(self.most) and all(
            low <= size <= high
            for low, size, high in zip(self.least, sizes, self.most, strict=True)
        )

    @classmethod
    def read(cls, data: Fields) -> Self:
        """Return the bounds written as ``data``."""
        return cls(*(data.numbers(field.name) for field in dataclasses.fields(cls)))


@dataclass(frozen=True)
class Profile:
    """One range of sizes that an engine has kernels for.

    Args:
        name: ``"prefill"``, ``"decode"`` or ``"all"``.
        shapes: Shape of each input with a free size.
        values: Value of each input whose *number* decides a size.
    """

    name: str
    shapes: Mapping[str, InputRange] = field(default_factory=dict)
    values: Mapping[str, InputRange] = field(default_factory=dict)

    @classmethod
    def read(cls, data: Fields) -> Self:
        """Return the profile written as ``data``."""
        parts = {
            key: {name: InputRange.read(data.child(key).child(name)) for name in data.mapping(key)}
            for key in ("shapes", "values")
        }
        return cls(data.text("name"), parts["shapes"], parts["values"])


@dataclass(frozen=True)
class EngineRecipe:
    """How to build the engine of an artifact.

    Args:
        package: The Python package: ``"tensorrt_rtx"`` or ``"tensorrt"``.
        capabilities: Compute capabilities that engines were built for, ``"8.9"``; none where the
            engine is built at the first load, for the GPU that is there.
        profiles: The sizes to serve.
        network: The typed network's file.
        tolerance: Largest error of an engine against ``golden.npz``, relative.
    """

    package: str
    capabilities: tuple[str, ...]
    profiles: tuple[Profile, ...]
    network: str = NETWORK
    tolerance: float = 0.0

    def to_json(self) -> str:
        """Return the text of ``build.json``: sorted keys, two spaces, a final newline."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, indent=2) + "\n"

    @classmethod
    def load(cls, path: Path) -> Self:
        """Return the recipe that a file holds.

        Raises:
            ArtifactError: There is none, or it cannot be read.
        """
        try:
            data: Any = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ArtifactError(path, error.strerror or str(error)) from error
        except ValueError as error:
            raise ArtifactError(path, f"not JSON ({error})") from error
        fields = Fields(data, path)
        capabilities = fields.dimensions("capabilities")
        return cls(
            package=fields.text("package"),
            capabilities=tuple(str(each) for each in capabilities),
            profiles=tuple(map(Profile.read, fields.items("profiles"))),
            network=fields.text("network", NETWORK),
            tolerance=float(data.get("tolerance", 0.0)),
        )


def engine_file(capability: str) -> str:
    """Return the name of the engine for a compute capability.

    >>> engine_file("8.9"), engine_file("12.0")
    ('model.sm89.engine', 'model.sm120.engine')
    """
    return f"model.sm{capability.replace('.', '')}.engine"
