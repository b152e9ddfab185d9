"""Putting caches into a decoder that was read: past keys and values go before the new ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from llmopt.interface.signature import Port, Role
from llmopt.ir import graph as g
from llmopt.ir.attention import AttentionOp
from llmopt.passes.incremental.flow import BATCH, KEYS, TOKENS, Atom, Axis, refuse, special
from llmopt.passes.incremental.padding import mask_padding
from llmopt.passes.incremental.prelude import Prelude
from llmopt.passes.incremental.reading import CachedAttention, DecoderReading, Site, Use
from llmopt.passes.raise_attention import unrepeated

_ROLES: Final = {
    "key": (Role.PAST_KEY, Role.PRESENT_KEY),
    "value": (Role.PAST_VALUE, Role.PRESENT_VALUE),
}


@dataclass(frozen=True)
class Cache:
    """Keys or values of one layer.

    Args:
        past: Cache input and its name.
        present: Cache output; named once it exists.
        value: The graph input.
    """

    past: Port
    present: Port
    value: ir.Value

    @property
    def sizes(self) -> tuple[int, int]:
        """Heads and width, G and D."""
        _, heads, _, width = self.past.shape
        assert isinstance(heads, int)
        assert isinstance(width, int)
        return heads, width


def add_caches(reading: DecoderReading, *, padded: bool) -> list[Cache]:
    """Let the decoder remember, and return its caches: key and value, layer by layer.

    Args:
        reading: The decoder.
        padded: Whether it was given a mask and positions.

    Raises:
        NotIncrementalError: a layer has keys without values, or a size is not known.
    """
    found = _all_declared(reading)
    caches = [found[key] for key in sorted(found)]
    graph = reading.program.graph
    graph.inputs.extend(cache.value for cache in caches)
    prelude = Prelude(reading.program, reading.proofs, caches[0].value)
    for use in reading.uses:
        use.node.replace_input_with(use.index, _longer(prelude, use, padded=padded))
    if padded:
        mask_padding(reading)
    for node in reading.stretched:
        target = _target(prelude, reading.flows[node.outputs[0]].axes)
        node.replace_input_with(1, target)
        node.attributes.pop("allowzero", None)
    presents = {}
    for site in reading.sites:
        key = site.layer, site.part
        presents[key] = _concatenated(prelude, site, found[key])
    for fused in reading.fused:
        keys = (fused.layer, "key"), (fused.layer, "value")
        pair = found[keys[0]], found[keys[1]]
        presents |= zip(keys, _remembered(fused, pair), strict=True)
    for key in sorted(found):
        _show(graph, presents[key], found[key])
    _stretch(reading)
    return caches


def _longer(prelude: Prelude, use: Use, *, padded: bool) -> ir.Value:
    """Return what stands for a value of positions when there is a past."""
    value = g.operand(use.node, use.index)
    if use.rows is None:
        return prelude.at_full_length(value)
    if padded and use.keys is None and use.batch is not None:
        return prelude.placed(value, use.rows, use.batch)
    return prelude.rows(value, use.rows)


def _all_declared(reading: DecoderReading) -> dict[tuple[int, str], Cache]:
    """Return a cache for the keys and one for the values of every layer."""
    found: dict[tuple[int, str], Cache] = {}
    for fused in reading.fused:
        for part, value in zip(("key", "value"), _grouped(fused.node), strict=True):
            sizes = _fused_sizes(fused.node, value)
            found[fused.layer, part] = _declared(fused.layer, part, value, sizes)
    for site in reading.sites:
        if (site.layer, site.part) in found:
            raise refuse(site.node, f"is the second product with {site.part}s of one attention")
        value = g.operand(site.node, site.index)
        found[site.layer, site.part] = _declared(site.layer, site.part, value, _site_sizes(site))
    for site in reading.sites:
        if (site.layer, "value") not in found:
            raise refuse(site.node, "has scores that weigh no values")
    if not found:
        raise refuse(reading.program.graph[-1], "is reached without attention: nothing to keep")
    return found


def _grouped(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    """Return keys and values of an Attention, before each head was repeated for its queries."""
    op = AttentionOp.of(node)
    k, v = op.k, op.v
    if g.rank(k) != 4:
        return k, v
    fewer = unrepeated(k), unrepeated(v)
    return fewer if g.static(fewer[0], 1) == g.static(fewer[1], 1) else (k, v)


def _fused_sizes(node: ir.Node, value: ir.Value) -> tuple[int, int]:
    heads, width = g.static(value, 1), g.static(value, -1)
    if g.rank(value) == 3 and width:
        heads = AttentionOp.of(node).groups
        width = width // heads if heads else None
    if not heads or not width:
        raise refuse(node, f"has keys or values {g.shape(value)} of unknown heads or width")
    return heads, width


def _site_sizes(site: Site) -> tuple[int, int]:
    heads = 1
    for at, axis in enumerate(site.axes):
        if at != site.depth:
            for atom in axis:
                heads *= atom if isinstance(atom, int) else 1
    (width,) = site.axes[site.depth]
    assert isinstance(width, int)
    return heads, width


def _declared(layer: int, part: str, like: ir.Value, sizes: tuple[int, int]) -> Cache:
    dtype = like.dtype or ir.DataType.FLOAT
    heads, width = sizes
    past = f"past_key_values.{layer}.{part}"
    kind = str(dtype.numpy().name)
    value = ir.Value(name=past, shape=ir.Shape(["B", heads, "P", width]), type=ir.TensorType(dtype))
    roles = _ROLES[part]
    return Cache(
        Port(past, roles[0], kind, ("B", heads, "P", width), layer),
        Port(f"present.{layer}.{part}", roles[1], kind, ("B", heads, "T", width), layer),
        value,
    )


def _remembered(fused: CachedAttention, pair: tuple[Cache, Cache]) -> Sequence[ir.Value]:
    """Give an Attention its past, and return what it presents."""
    node = fused.node
    attributes = {name: attr.value for name, attr in node.attributes.items()}
    op = AttentionOp.of(node)
    inputs = [op.q, *_grouped(node), op.mask, *(cache.value for cache in pair)]
    build = g.Builder(node)
    out, *present = build.ops("Attention", inputs, attributes, outputs=3, name=node.name)
    g.replace(op.y, out)
    return present


def _concatenated(prelude: Prelude, site: Site, cache: Cache) -> ir.Value:
    """Put a past before the keys or values of a product, and return both together."""
    build = g.Builder(site.node)
    atoms = [atom for axis in site.axes for atom in axis]
    at = sum(len(axis) for axis in site.axes[: site.depth])
    heads = [i for i, atom in enumerate(atoms) if isinstance(atom, int) and i != at]
    order = [atoms.index(BATCH), *heads, atoms.index(TOKENS), at]
    new = _reshape(build, prelude, g.operand(site.node, site.index), [(atom,) for atom in atoms])
    new = _transpose(build, new, order)
    groups, width = cache.sizes
    new = _reshape(build, prelude, new, [(BATCH,), (groups,), (TOKENS,), (width,)])
    both = build.op(
        "Concat", [cache.value, new], {"axis": 2}, like=cache.value, shape=["B", groups, "T", width]
    )
    longer: list[Atom] = [KEYS if atom == TOKENS else atom for atom in atoms]
    back = _reshape(build, prelude, both, [(longer[i],) for i in order])
    back = _transpose(build, back, [order.index(i) for i in range(len(order))])
    axes = [tuple(KEYS if atom == TOKENS else atom for atom in axis) for axis in site.axes]
    site.node.replace_input_with(site.index, _reshape(build, prelude, back, axes))
    return both


def _reshape(build: g.Builder, prelude: Prelude, value: ir.Value, axes: Sequence[Axis]) -> ir.Value:
    return build.op("Reshape", [value, _target(prelude, axes)], like=value, shape=_shape(axes))


def _transpose(build: g.Builder, value: ir.Value, order: Sequence[int]) -> ir.Value:
    dims = g.shape(value)
    assert dims is not None
    return build.op(
        "Transpose", [value], {"perm": list(order)}, like=value, shape=[dims[i] for i in order]
    )


_LETTERS: Final = {BATCH: "B", TOKENS: "S", KEYS: "T"}


def _shape(axes: Sequence[Axis]) -> ir.Shape:
    return ir.Shape([_dim(axis) for axis in axes])


def _dim(axis: Axis) -> g.Dim:
    count, letters = _parts(axis)
    if not letters:
        return count
    return "*".join([*([str(count)] if count > 1 else []), *(_LETTERS[each] for each in letters)])


def _parts(axis: Axis) -> tuple[int, list[str]]:
    """Return the number in an axis and what else is."""
    count = 1
    for atom in axis:
        count *= atom if isinstance(atom, int) else 1
    return count, [str(atom) for atom in axis if not isinstance(atom, int)]


def _target(prelude: Prelude, axes: Sequence[Axis]) -> ir.Value:
    """Return the sizes of axes, for a Reshape: -1 for the one that has the most in it."""
    free = [at for at, axis in enumerate(axes) if special(axis)]
    build = prelude.build
    left = max(free, key=lambda at: len(axes[at]), default=None)
    if len(free) <= 1:
        numbers = [-1 if at == left else _parts(a)[0] for at, a in enumerate(axes)]
        return build.constant(numbers, "int64")
    known = {BATCH: prelude.batch, TOKENS: prelude.new, KEYS: prelude.total}
    parts = []
    for at, axis in enumerate(axes):
        count, letters = _parts(axis)
        number = build.constant([-1 if at == left else count], "int64")
        for letter in letters if at != left else ():
            number = build.op("Mul", [number, known[letter]])
        parts.append(number)
    return build.op("Concat", parts, {"axis": 0})


def _show(graph: ir.Graph, value: ir.Value, cache: Cache) -> None:
    value.name = g.unused(graph, cache.present.name)
    value.shape, value.type = ir.Shape(list(cache.present.shape)), cache.value.type
    graph.outputs.append(value)


def _stretch(reading: DecoderReading) -> None:
    """Write T where scores have all keys now."""
    for value, flow in reading.flows.items():
        if flow.holds(KEYS) and (dims := g.shape(value)) is not None:
            pairs = zip(flow.axes, dims, strict=True)
            value.shape = ir.Shape(["T" if axis == (KEYS,) else dim for axis, dim in pairs])
