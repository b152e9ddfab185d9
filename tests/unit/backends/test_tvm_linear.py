"""Products with weights give what numpy gives, integers exactly, on every set of instructions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from llmopt.backends.tvm.features import Features, Processor, find_processor
from llmopt.backends.tvm.kernels.linear.selection import (
    Linear,
    LinearKernels,
    Packing,
    choose,
    pack,
)
from llmopt.backends.tvm.kernels.linear.storage import Storage, tiles
from llmopt.errors import UnsupportedModelError
from llmopt.quantization import packing
from llmopt.quantization.dynamic import Columns, quantize_columns
from llmopt.quantization.numerics import Quantized, dequantize, quantize_blockwise
from llmopt.quantization.schemes import Blockwise, Cast, DynamicInt8
from llmopt.runtime.cpu_features import tiles_allowed

tvm = pytest.importorskip("tvm", reason="apache-tvm is not installed")

from support.emulated_tiles import EmulatedTiles  # noqa: E402 - needs TVM

from llmopt.backends.tvm.kernels import amx  # noqa: E402 - needs TVM
from llmopt.backends.tvm.kernels.linear import products as linear_products  # noqa: E402 - needs TVM
from llmopt.backends.tvm.kernels.linear.panel import PanelSizes  # noqa: E402 - needs TVM
from llmopt.backends.tvm.kernels.rows import gather_packed  # noqa: E402 - needs TVM
from llmopt.backends.tvm.kernels.script import cast  # noqa: E402 - needs TVM
from llmopt.backends.tvm.kernels.vectors import shuffled  # noqa: E402 - needs TVM

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
WIDE = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", "avx512cd")
PROCESSORS = {
    "avx512vnni": ("cascadelake", Features(avx2=True, avx512=True, avx512vnni=True)),
    "avx512": ("skylake-avx512", Features(avx2=True, avx512=True)),
    "avx2": ("haswell", Features(avx2=True)),
    "portable": ("x86-64", Features()),
}
LINUX = {"avx512vnni": "avx512_vnni", "avx512": "avx512bw", "avx2": "avx2", "portable": "sse2"}


def processor(name: str) -> Processor:
    """Return a processor of x86 that this machine can stand in for, or skip the test."""
    with open("/proc/cpuinfo", encoding="ascii") as file:  # noqa: PTH123 - a device, not a path
        flags = next((line.split() for line in file if line.startswith("flags")), [])
    if LINUX[name] not in flags:
        pytest.skip(f"this processor has no {name}")
    mcpu, features = PROCESSORS[name]
    found = find_processor("x86_64", mcpu)
    assert found.features == features
    return found


def compiled(kernels: LinearKernels, target: dict[str, object]) -> Callable[..., None]:
    """Return the product's one kernel as a function."""
    (kernel,) = kernels.kernels
    module = tvm.IRModule({kernel.name: kernel.function})
    found: Callable[..., None] = tvm.compile(module, target=tvm.target.Target(target))[kernel.name]
    return found


class Product:
    """A product that is compiled once and runs on several activations."""

    def __init__(self, wanted: Linear, name: str, weight: Any, mcpu: str = "") -> None:
        self.wanted = wanted
        self.kernels = choose(wanted)
        found = find_processor("x86_64", mcpu) if mcpu else processor(name)
        self.run = compiled(self.kernels, found.target)
        self.arrays = pack(weight, self.kernels.packing)

    def __call__(self, x: Floats, **others: Floats) -> Floats:
        """Return the result for ``x``."""
        y = tvm.runtime.tensor(np.full((len(x), self.wanted.columns), np.nan, np.float32))
        named = {"x": x, **self.arrays, **others}
        inputs = self.kernels.kernels[0].inputs
        self.run(*(tvm.runtime.tensor(named[name]) for name in inputs), y)
        return np.asarray(y.numpy())


def whole_numbers(rng: np.random.Generator, m: int, k: int, block: int) -> Floats:
    """Return whole numbers of -127 … 127, one of 127 in each block: rounding leaves them."""
    x = rng.integers(-127, 128, (m, k)).astype(np.float32)
    x[:, ::block] = 127
    return x


def random_codes(rng: np.random.Generator, n: int, k: int, scheme: Blockwise) -> Quantized:
    """Return a weight of whole numbers: all codes and zero points, scales 1."""
    blocks = scheme.blocks(k)
    codes = rng.integers(0, scheme.levels, (n, scheme.padded(k)), dtype=np.uint8)
    points = None
    if not scheme.symmetric:
        points = rng.integers(0, scheme.levels, (n, blocks), dtype=np.uint8)
    return Quantized(codes, np.ones((n, blocks), np.float32), points, scheme, k)


SCHEMES = [
    Blockwise(4, 32),
    Blockwise(4, 64, symmetric=False),
    Blockwise(4, 128),
    Blockwise(6, 32),
    Blockwise(6, 16, symmetric=False),
    Blockwise(8, 16),
    Blockwise(8, 32, symmetric=False),
]


EXACT = [(name, scheme) for name in ("avx512vnni", "avx2") for scheme in SCHEMES]
EXACT += [(name, scheme) for name in ("avx512", "portable") for scheme in SCHEMES[1::2]]


@pytest.mark.parametrize(("name", "scheme"), EXACT, ids=str)
def test_products_of_whole_numbers_are_exact(name: str, scheme: Blockwise) -> None:
    rng = np.random.default_rng(0)
    n, k = 37, 250
    weight = random_codes(rng, n, k, scheme)
    numbers = dequantize(weight).astype(np.int64)
    for rows, sizes in (("one", (1,)), ("many", (1, 2, 17))):
        wanted = Linear(n, k, scheme, rows, (), PROCESSORS[name][1])  # type: ignore[arg-type]
        product = Product(wanted, name, weight)
        for m in sizes:
            x = whole_numbers(rng, m, k, scheme.block)
            np.testing.assert_array_equal(product(x), x.astype(np.int64) @ numbers.T)


@pytest.mark.parametrize("limit", [64, 127])
@pytest.mark.parametrize("name", PROCESSORS)
def test_dynamic_int8_of_whole_numbers_is_exact(name: str, limit: int) -> None:
    rng = np.random.default_rng(1)
    n, k = 41, 300
    codes = rng.choice(np.array([-limit, -1, 0, 1, limit], np.int8), (k, n))
    weight = Columns(codes, np.ones(n, np.float32))
    for rows, sizes in (("one", (1,)), ("many", (3, 7))):
        features = PROCESSORS[name][1]
        wanted = Linear(n, k, DynamicInt8(), rows, (), features, limit=limit)  # type: ignore[arg-type]
        product = Product(wanted, name, weight)
        for m in sizes:
            x = whole_numbers(rng, m, k, k)
            np.testing.assert_array_equal(product(x), x.astype(np.int64) @ codes.astype(np.int64))


def rounded(x: Floats, bits: int, block: int) -> tuple[Array, Floats]:
    """Return codes [M, blocks, block] and scales [M, blocks] as the kernels find them.

    Blocks of 4 bits share a scale up to 128 columns, as many as divide the row.
    """
    m, k = x.shape
    blocks = -(-k // block)
    most = 128 // block if bits == 4 else 1
    shared = max(count for count in range(1, most + 1) if blocks % count == 0)
    values = np.pad(x, ((0, 0), (0, -k % block))).reshape(m, -1, shared * block)
    largest = np.abs(values).max(axis=2)
    inverse = np.where(largest > 1e-30, np.float32(127) / np.maximum(largest, 1e-30), 0)
    codes = np.rint(values * inverse[..., None].astype(np.float32))
    scale = np.repeat((largest * np.float32(1 / 127)).astype(np.float32), shared, axis=1)
    return codes.reshape(m, blocks, block), scale


def block_product(x: Floats, weight: Quantized) -> npt.NDArray[np.float64]:
    """Return the product with rounded activations, sums of blocks exact, in float64."""
    n, block = len(weight.codes), weight.scheme.block
    codes, scale = rounded(x, weight.scheme.bits, block)
    points = weight.scheme.middle if weight.zero_point is None else weight.zero_point[..., None]
    numbers = weight.codes.reshape(n, -1, block).astype(np.float64) - points
    halved = weight.scale.astype(np.float16).astype(np.float64)
    found: npt.NDArray[np.float64] = np.einsum(
        "mbk,nbk,mb,nb->mn", codes.astype(np.float64), numbers, scale.astype(np.float64), halved
    )
    return found


def tiled_product(x: Floats, weight: Quantized, columns: int) -> npt.NDArray[np.float64]:
    """Return the product as tiles have it: 4 bits as bytes with one scale a row, in float64.

    Args:
        x: [M, K].
        weight: [N, K], symmetric.
        columns: Of the panel, whose activations share a scale.
    """
    n, block = len(weight.codes), weight.scheme.block
    halved = weight.scale.astype(np.float16).astype(np.float32)
    end = np.abs(halved).max(axis=1) * np.float32(1 / 15)
    ratio = np.rint(halved * (np.float32(2048) / end)[:, None]).astype(np.int64)
    codes = (weight.codes.reshape(n, -1, block).astype(np.int64) - 8) * 16
    numbers = (codes * ratio[..., None] + (1 << 14) >> 15).reshape(n, -1)
    rows, scale = rounded(x, 8, columns)
    values = rows.reshape(len(x), -1) * np.repeat(scale, columns, axis=1)
    found: npt.NDArray[np.float64] = values[:, : numbers.shape[1]].astype(np.float64) @ numbers.T
    found *= end
    return found


def close(found: Floats, expected: Array, relative: float) -> None:
    assert np.abs(found - expected).max() <= relative * np.abs(expected).max()


@pytest.mark.parametrize("scheme", SCHEMES[:2], ids=str)
@pytest.mark.parametrize("rows", ["one", "many"])
@pytest.mark.parametrize("k", [200, 370])
def test_blocks_of_rounded_activations_share_scales(rows: str, scheme: Blockwise, k: int) -> None:
    rng = np.random.default_rng(2)
    n = 37
    weight = quantize_blockwise(rng.standard_normal((n, k)).astype(np.float32), scheme)
    wanted = Linear(n, k, scheme, rows, (), PROCESSORS["avx2"][1])  # type: ignore[arg-type]
    product = Product(wanted, "avx2", weight)
    x = rng.standard_normal((1 if rows == "one" else 5, k)).astype(np.float32)
    x[0, 128:256] = 0  # zeros
    x[0, 3] = 1000  # an outlier spoils what shares its scale only
    close(product(x), block_product(x, weight), 1e-5)


@pytest.mark.parametrize(
    "scheme", [Blockwise(4, 32), Blockwise(6, 32), Blockwise(8, 64, symmetric=False)], ids=str
)
@pytest.mark.parametrize("rows", ["one", "many"])
@pytest.mark.parametrize("name", ["avx512vnni", "avx2"])
def test_exact_products_leave_activations_alone(name: str, rows: str, scheme: Blockwise) -> None:
    rng = np.random.default_rng(3)
    n, k = 37, 75
    values = rng.standard_normal((n, k)).astype(np.float32)
    weight = quantize_blockwise(values, scheme, scale_dtype=np.float16)
    features = PROCESSORS[name][1]
    wanted = Linear(n, k, scheme, rows, (), features, exact=True)  # type: ignore[arg-type]
    x = rng.standard_normal((1 if rows == "one" else 6, k)).astype(np.float32)
    close(Product(wanted, name, weight)(x), x @ dequantize(weight).T, 1e-5)


def test_exact_products_of_int8_codes_leave_activations_alone() -> None:
    rng = np.random.default_rng(4)
    weight = quantize_columns(rng.standard_normal((75, 37)).astype(np.float32), 64)
    wanted = Linear(37, 75, DynamicInt8(), "many", (), PROCESSORS["avx2"][1], exact=True)
    x = rng.standard_normal((3, 75)).astype(np.float32)
    close(Product(wanted, "avx2", weight)(x), x @ (weight.codes * weight.scale), 1e-5)


@pytest.mark.parametrize("name", ["avx512vnni", "avx2", "portable"])
def test_float_products_are_numpys(name: str) -> None:
    rng = np.random.default_rng(5)
    n, k = 75, 131
    weight = rng.standard_normal((n, k)).astype(np.float32)
    for rows, sizes in (("one", (1,)), ("many", (1, 2, 3, 17, 300))):
        wanted = Linear(n, k, None, rows, (), PROCESSORS[name][1])  # type: ignore[arg-type]
        product = Product(wanted, name, weight)
        for m in sizes:
            x = rng.standard_normal((m, k)).astype(np.float32)
            close(product(x), x.astype(np.float64) @ weight.T.astype(np.float64), 1e-5)


BF16 = Cast("bfloat16")


def nearest(values: Array) -> Floats:
    """Return the nearest numbers of bfloat16."""
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


@pytest.mark.parametrize("name", ["avx512vnni", "avx2", "portable"])
def test_products_with_bfloat16_weights_leave_activations_alone(name: str) -> None:
    rng = np.random.default_rng(15)
    n, k = 75, 131
    weight = rng.standard_normal((n, k)).astype(np.float32)
    for rows, sizes in (("one", (1,)), ("many", (1, 2, 17))):
        wanted = Linear(n, k, BF16, rows, (), PROCESSORS[name][1])  # type: ignore[arg-type]
        product = Product(wanted, name, weight)
        for m in sizes:
            x = rng.standard_normal((m, k)).astype(np.float32)
            close(product(x), x.astype(np.float64) @ nearest(weight).T.astype(np.float64), 1e-5)


def test_rows_of_bfloat16_are_looked_up_in_the_weight_of_a_product() -> None:
    rng = np.random.default_rng(16)
    weight = rng.standard_normal((70, 45)).astype(np.float32)
    for features in (PROCESSORS["portable"][1], BFLOAT):
        packed = choose(Linear(70, 45, BF16, features=features)).packing
        lookup = compiled(LinearKernels((gather_packed(packed),), packed), processor("avx2").target)
        ids = np.array([69, 0, -1, 33])
        y = tvm.runtime.tensor(np.zeros((4, 45), np.float32))
        lookup(tvm.runtime.tensor(pack(weight, packed)["weights"]), tvm.runtime.tensor(ids), y)
        np.testing.assert_array_equal(y.numpy(), nearest(weight)[ids])


def erf(x: Array) -> Array:
    return np.vectorize(math.erf)(x)  # type: ignore[no-any-return]


def gelu(x: Array) -> Array:
    return x * (1 + erf(x / math.sqrt(2))) / 2  # type: ignore[no-any-return]


def gelu_tanh(x: Array) -> Array:
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2  # type: ignore[no-any-return]


@pytest.mark.parametrize(("step", "function"), [("gelu", gelu), ("gelu_tanh", gelu_tanh)])
@pytest.mark.parametrize("name", ["avx512vnni", "avx2"])
def test_activations_are_within_some_millionths(
    name: str, step: str, function: Callable[[Array], Array]
) -> None:
    x = np.concatenate([np.linspace(-8, 8, 640), [0, 1e-20, -90, 90, 1e4, -1e4]])
    x = np.resize(x, (40, 17)).astype(np.float32)
    wanted = Linear(17, 17, None, "many", (step,), PROCESSORS[name][1])
    found = Product(wanted, name, np.eye(17, dtype=np.float32))(x)
    np.testing.assert_allclose(found, function(x.astype(np.float64)), rtol=1e-6, atol=1.5e-6)


@pytest.mark.parametrize("scheme", [None, Blockwise(4, 32)], ids=str)
@pytest.mark.parametrize("name", ["avx512vnni", "avx2"])
def test_a_gated_product_takes_bias_and_residual(name: str, scheme: Blockwise | None) -> None:
    rng = np.random.default_rng(6)
    n, k, m = 74, 64, 5
    values = rng.standard_normal((n, k)).astype(np.float32)
    weight = values if scheme is None else quantize_blockwise(values, scheme)
    x = rng.standard_normal((m, k)).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32)
    residual = rng.standard_normal((m, n // 2)).astype(np.float32)
    steps = ("bias", "swiglu", "residual")
    features = PROCESSORS[name][1]
    found = Product(Linear(n, k, scheme, "many", steps, features), name, weight)
    plain = x @ values.T if isinstance(weight, np.ndarray) else block_product(x, weight)
    gate, up = np.split(plain.astype(np.float64) + bias, 2, axis=1)
    expected = gate / (1 + np.exp(-gate)) * up + residual
    close(found(x, bias=bias, residual=residual), expected, 1e-5)


@pytest.mark.parametrize("rows", ["one", "many"])
@pytest.mark.parametrize("scheme", [None, Blockwise(8, 32)], ids=str)
def test_bias_and_residual_are_added(rows: str, scheme: Blockwise | None) -> None:
    rng = np.random.default_rng(7)
    n, k, m = 70, 96, 1 if rows == "one" else 4
    weight = np.zeros((n, k), np.float32)
    x, residual = rng.standard_normal((m, k)), rng.standard_normal((m, n))
    bias = rng.standard_normal(n).astype(np.float32)
    steps, features = ("bias", "residual"), PROCESSORS["avx2"][1]
    product = Product(Linear(n, k, scheme, rows, steps, features), "avx2", weight)  # type: ignore[arg-type]
    found = product(x.astype(np.float32), bias=bias, residual=residual.astype(np.float32))
    np.testing.assert_array_equal(found, bias + residual.astype(np.float32))


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("scheme", [*SCHEMES, None, BF16, DynamicInt8()], ids=str)
def test_packed_arrays_are_what_the_packing_says(
    scheme: Blockwise | DynamicInt8 | Cast | None, *, paired: bool
) -> None:
    rng = np.random.default_rng(8)
    weight: Any = rng.standard_normal((70, 45)).astype(np.float32)
    if isinstance(scheme, DynamicInt8):
        weight = quantize_columns(weight.T)
    epilogue = ("swiglu",) if paired else ()
    wanted = Linear(70, 45, scheme, "one", epilogue, PROCESSORS["portable"][1])
    packed = Packing(70, 45, wanted.storage, paired)
    found = {name: (a.shape, a.dtype.name) for name, a in pack(weight, packed).items()}
    assert found == packed.arrays


def test_a_weight_is_packed_the_same_from_floats_codes_and_bytes() -> None:
    rng = np.random.default_rng(9)
    for scheme in SCHEMES:
        values = rng.standard_normal((64, 45)).astype(np.float32)
        codes = quantize_blockwise(values, scheme)
        packed = choose(Linear(64, 45, scheme, features=PROCESSORS["avx2"][1])).packing
        first = pack(values, packed)
        for other in (codes, packing.pack(codes)):
            for name, array in pack(other, packed).items():
                np.testing.assert_array_equal(array, first[name])


def test_weights_are_packed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(10).standard_normal((200, 32)).astype(np.float32)
    packed = choose(Linear(200, 32, Blockwise(4, 32))).packing
    whole = pack(values, packed)
    monkeypatch.setattr("llmopt.backends.tvm.kernels.linear.pack._CHUNK", 1)
    for name, array in pack(values, packed).items():
        np.testing.assert_array_equal(array, whole[name])


def test_codes_that_would_saturate_are_refused() -> None:
    weight = Columns(np.full((32, 16), 65, np.int8), np.ones(16, np.float32))
    wanted = Linear(16, 32, DynamicInt8(), features=PROCESSORS["avx2"][1], limit=64)
    with pytest.raises(UnsupportedModelError, match="limit=64"):
        pack(weight, choose(wanted).packing)


def test_scales_beyond_float16_are_refused() -> None:
    weight = np.full((16, 32), 1e6, np.float32)
    with pytest.raises(UnsupportedModelError, match="float16"):
        pack(weight, choose(Linear(16, 32, Blockwise(4, 32))).packing)


@pytest.mark.parametrize(
    ("weight", "problem"),
    [
        (np.zeros((3, 32), np.float32), "packing of"),
        (Columns(np.zeros((32, 16), np.int8), np.ones(16, np.float32)), "does not fit"),
        (quantize_blockwise(np.zeros((16, 32), np.float32), Blockwise(8, 32)), "does not fit"),
    ],
)
def test_a_weight_that_does_not_fit_is_refused(weight: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        pack(weight, choose(Linear(16, 32, Blockwise(4, 32))).packing)


@pytest.mark.parametrize("steps", [("residual", "bias"), ("relu",), ("gelu", "swiglu")])
def test_unknown_epilogues_are_refused(steps: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="epilogue"):
        Linear(16, 32, epilogue=steps)


def test_gates_need_as_many_rows_as_they_gate() -> None:
    with pytest.raises(ValueError, match="as many"):
        Linear(33, 32, epilogue=("swiglu",))
    assert tiles(34, paired=True) == 2


def test_kernels_of_different_products_have_different_names() -> None:
    names = [
        choose(Linear(32, k, scheme, rows, steps, exact=exact)).kernels[0].name
        for k in (32, 64)
        for scheme in (None, Blockwise(4, 32), Blockwise(4, 32, symmetric=False), DynamicInt8())
        for rows in ("one", "many")
        for steps in ((), ("swiglu",))
        for exact in ((False, True) if scheme else (False,))
    ]
    assert len(set(names)) == len(names)


SAPPHIRE_RAPIDS = Features(avx2=True, avx512=True, avx512vnni=True, amx_int8=True)
BFLOAT = Features(avx2=True, avx512=True, avx512bf16=True, amx_bf16=True)
TILED = [
    Blockwise(4, 32),
    Blockwise(4, 128, symmetric=False),
    Blockwise(6, 32),
    Blockwise(6, 64, symmetric=False),
    Blockwise(8, 64),
    Blockwise(8, 32, symmetric=False),
    DynamicInt8(),
]


@pytest.mark.parametrize("scheme", TILED, ids=str)
def test_the_kernel_of_tiles_is_right_with_emulated_tiles(
    scheme: Blockwise | DynamicInt8, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amx, "Intrinsics", EmulatedTiles)
    rng = np.random.default_rng(11)
    n, k = 70, 250
    if isinstance(scheme, DynamicInt8):
        block, codes = k, rng.integers(-64, 65, (k, n)).astype(np.int8)
        weight: Any = Columns(codes, np.ones(n, np.float32))
        numbers = codes.T.astype(np.int64)
    else:
        block, weight = scheme.block, random_codes(rng, n, k, scheme)
        numbers = dequantize(weight).astype(np.int64)
    product = Product(Linear(n, k, scheme, "many", (), SAPPHIRE_RAPIDS), "avx512vnni", weight)
    for m in (1, 17, 70):
        x = whole_numbers(rng, m, k, block)
        expected = x.astype(np.int64) @ numbers.T
        if getattr(scheme, "bits", 8) == 4:  # bytes are 15 times the codes, or 8
            close(product(x), expected, 1e-6)
        else:
            np.testing.assert_array_equal(product(x), expected)


def test_the_kernel_of_tiles_finishes_with_the_epilogue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amx, "Intrinsics", EmulatedTiles)
    rng = np.random.default_rng(12)
    n, k, m, scheme = 64, 64, 40, Blockwise(4, 32)
    weight = quantize_blockwise(rng.standard_normal((n, k)).astype(np.float32), scheme)
    x, bias = rng.standard_normal((m, k)).astype(np.float32), rng.standard_normal(n)
    wanted = Linear(n, k, scheme, "many", ("bias", "swiglu"), SAPPHIRE_RAPIDS)
    product = Product(wanted, "avx512vnni", weight)
    found = product(x, bias=bias.astype(np.float32))
    gate, up = np.split(tiled_product(x, weight, 64) + bias, 2, axis=1)
    close(found, gate / (1 + np.exp(-gate)) * up, 1e-5)


@pytest.mark.parametrize("k", [704, 1300], ids=["a-short-last-panel", "panels-alike"])
def test_weights_of_4_bits_get_one_scale_a_row_on_tiles(
    k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amx, "Intrinsics", EmulatedTiles)
    rng = np.random.default_rng(14)
    n, m, scheme = 40, 35, Blockwise(4, 32)
    values = rng.standard_normal((n, k)) * np.exp(rng.standard_normal((n, k // 4)).repeat(4, 1))
    weight = quantize_blockwise(values.astype(np.float32), scheme)
    wanted = Linear(n, k, scheme, "many", (), SAPPHIRE_RAPIDS)
    assert isinstance(wanted.storage, Storage)
    form = PanelSizes.of(wanted.storage)
    x = rng.standard_normal((m, k)).astype(np.float32)
    found = Product(wanted, "avx512vnni", weight)(x)
    close(found, tiled_product(x, weight, form.columns), 1e-5)
    exact = x.astype(np.float64) @ dequantize(weight).T.astype(np.float64)
    lost = np.linalg.norm(exact - x @ values.T)  # by 4 bits
    assert np.linalg.norm(found - exact) < lost / 3


@pytest.mark.parametrize("k", [250, 64, 20])
def test_bfloat16_on_tiles_is_right_with_emulated_tiles(
    k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amx, "Intrinsics", EmulatedTiles)
    rng = np.random.default_rng(17)
    weight = rng.standard_normal((70, k)).astype(np.float32)
    product = Product(Linear(70, k, BF16, "many", (), BFLOAT), "avx512vnni", weight)
    for m in (1, 17, 70):
        x = nearest(rng.standard_normal((m, k)))  # so that only weights are rounded
        close(product(x), x.astype(np.float64) @ nearest(weight).T.astype(np.float64), 1e-5)


def test_bfloat16_on_tiles_rounds_rows_and_finishes_with_the_epilogue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(amx, "Intrinsics", EmulatedTiles)
    rng = np.random.default_rng(18)
    n, k, m = 64, 96, 40
    weight, x = (rng.standard_normal((rows, k)).astype(np.float32) for rows in (n, m))
    bias, residual = rng.standard_normal(n), rng.standard_normal((m, n // 2))
    wanted = Linear(n, k, BF16, "many", ("bias", "swiglu", "residual"), BFLOAT)
    given = {"bias": bias.astype(np.float32), "residual": residual.astype(np.float32)}
    found = Product(wanted, "avx512vnni", weight)(x, **given)
    gate, up = np.split(nearest(x) @ nearest(weight).T + bias, 2, axis=1)
    close(found, gate / (1 + np.exp(-gate)) * up + residual, 1e-5)


def test_bfloat16_runs_on_amx() -> None:
    with open("/proc/cpuinfo", encoding="ascii") as file:  # noqa: PTH123 - a device, not a path
        if "amx_bf16" not in file.read():
            pytest.skip("this processor has no amx_bf16")
    assert tiles_allowed()
    rng = np.random.default_rng(19)
    weight, x = (rng.standard_normal((rows, 170)).astype(np.float32) for rows in (70, 300))
    product = Product(
        Linear(70, 170, BF16, "many", (), BFLOAT), "avx512vnni", weight, "sapphirerapids"
    )
    close(product(x), nearest(x).astype(np.float64) @ nearest(weight).T.astype(np.float64), 1e-5)


def test_panels_are_as_even_as_can_be() -> None:
    def sizes(k: int, scheme: Blockwise | None = None) -> tuple[int, int]:
        wanted = Linear(32, k, scheme or Blockwise(4, 32), features=SAPPHIRE_RAPIDS)
        assert isinstance(wanted.storage, Storage)
        form = PanelSizes.of(wanted.storage)
        return form.columns, form.count

    assert [sizes(k) for k in (32, 576, 1536, 2048, 8192)] == [
        (64, 1), (576, 1), (512, 3), (512, 4), (512, 16)
    ]  # fmt: skip
    assert sizes(1300) == (448, 3)  # 41 blocks of 32 in three
    assert sizes(1152, Blockwise(4, 256)) == (768, 2)  # whole blocks


def test_tiles_run_on_amx() -> None:
    with open("/proc/cpuinfo", encoding="ascii") as file:  # noqa: PTH123 - a device, not a path
        if "amx_int8" not in file.read():
            pytest.skip("this processor has no amx_int8")
    assert tiles_allowed()
    rng = np.random.default_rng(13)
    weight = random_codes(rng, 70, 150, Blockwise(4, 32))
    wanted = Linear(70, 150, Blockwise(4, 32), "many", (), SAPPHIRE_RAPIDS)
    product = Product(wanted, "avx512vnni", weight, "sapphirerapids")
    x = whole_numbers(rng, 70, 150, 32)
    expected = x.astype(np.int64) @ dequantize(weight).astype(np.int64).T
    close(product(x), expected, 1e-6)


def test_code_for_amx_is_generated() -> None:
    target = find_processor("x86_64", "sapphirerapids")
    assert target.features.amx_int8
    kernel = choose(Linear(32, 64, Blockwise(4, 64), "many", (), target.features)).kernels[0]
    code = tvm.compile(
        tvm.IRModule({kernel.name: kernel.function}), target=tvm.target.Target(target.target)
    )
    text = code.mod.inspect_source("asm")
    assert text.count("tdpbssd") % 4 == 0
    assert "tdpbssd" in text
    assert "ldtilecfg" in text
    assert "tilerelease" in text
    kernel = choose(Linear(32, 64, BF16, "many", (), target.features)).kernels[0]
    code = tvm.compile(
        tvm.IRModule({kernel.name: kernel.function}), target=tvm.target.Target(target.target)
    )
    assert code.mod.inspect_source("asm").count("tdpbf16ps") % 4 == 0
    assert "tdpbf16ps" in code.mod.inspect_source("asm")


def test_code_for_256_bit_vnni_is_generated() -> None:
    target = find_processor("x86_64", "alderlake")
    assert target.features == Features(avx2=True, avxvnni=True)
    kernel = choose(Linear(32, 64, Blockwise(8, 32), "one", (), target.features)).kernels[0]
    module = tvm.IRModule({kernel.name: kernel.function})
    code = tvm.compile(module, target=tvm.target.Target(target.target))
    assert "vpdpbusd" in code.mod.inspect_source("asm")


@pytest.mark.parametrize(
    ("mcpu", "instruction"),
    [("neoverse-n1", "sdot"), ("cortex-a72", "mla")],
)
def test_arm64_code_is_generated(mcpu: str, instruction: str) -> None:
    arm = find_processor("aarch64", mcpu)
    for scheme in (Blockwise(4, 32), Blockwise(6, 32), Blockwise(8, 32), DynamicInt8()):
        kernel = choose(Linear(32, 64, scheme, "one", (), arm.features)).kernels[0]
        module = tvm.IRModule({kernel.name: kernel.function})
        code = tvm.compile(module, target=tvm.target.Target(arm.target))
        assert instruction in code.mod.inspect_source("asm")


MATRICES = Features(neon=True, dotprod=True, i8mm=True)


def emulated_smmla(total: Any, rows: Any, outputs: Any) -> Any:
    """Return the sums of two rows and two outputs, by multiplications that every processor has."""
    for k in range(8):
        x = shuffled(rows, rows, [k, k, 8 + k, 8 + k])
        w = shuffled(outputs, outputs, [k, 8 + k, k, 8 + k])
        total = total + cast("int32", x, 4) * cast("int32", w, 4)
    return total


@pytest.mark.parametrize("scheme", [*SCHEMES[1::4], DynamicInt8()], ids=str)
def test_products_of_two_rows_and_two_outputs_are_exact(
    scheme: Blockwise | DynamicInt8, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_products, "smmla", emulated_smmla)
    rng = np.random.default_rng(15)
    n, k = 37, 250
    if isinstance(scheme, DynamicInt8):
        block, codes = k, rng.integers(-127, 128, (k, n)).astype(np.int8)
        weight: Any = Columns(codes, np.ones(n, np.float32))
        numbers = codes.T.astype(np.int64)
    else:
        block, weight = scheme.block, random_codes(rng, n, k, scheme)
        numbers = dequantize(weight).astype(np.int64)
    wanted = Linear(n, k, scheme, "many", (), MATRICES, limit=127)
    product = Product(wanted, "avx2", weight)
    for m in (1, 8, 17):
        x = whole_numbers(rng, m, k, block)
        np.testing.assert_array_equal(product(x), x.astype(np.int64) @ numbers.T)


@pytest.mark.parametrize("scheme", [Blockwise(4, 32), Blockwise(8, 16), DynamicInt8()], ids=str)
def test_many_rows_use_smmla_where_the_processor_has_it(scheme: Blockwise | DynamicInt8) -> None:
    arm = find_processor("aarch64", "neoverse-n2")
    assert arm.features == MATRICES
    for rows, used, other in (("many", "smmla", "sdot"), ("one", "sdot", "smmla")):
        wanted = Linear(32, 64, scheme, rows, (), arm.features)  # type: ignore[arg-type]
        kernel = choose(wanted).kernels[0]
        module = tvm.IRModule({kernel.name: kernel.function})
        code = tvm.compile(module, target=tvm.target.Target(arm.target))
        text = code.mod.inspect_source("asm")
        assert used in text
        assert other not in text
