"""Programs of two layers, and passes that are wrong on purpose: one node of several, by one bug."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Final

import numpy as np
import onnx_ir as ir
from typing_extensions import override

from llmopt.frontend.base import Source
from llmopt.frontend.onnx.saved import SavedReference
from llmopt.ir import graph as g
from llmopt.ir import weights
from llmopt.ir.program import Program
from llmopt.passes.base import Outcome, Pass
from llmopt.passes.rounding import Rounding, RoundingPass
from support.programs import bound

HEADS, GROUPS, WIDTH, HIDDEN, FEED, VOCABULARY, LENGTH = 4, 2, 8, 32, 40, 11, 64
LAYER: Final = """
   [l{i}_norm] n{i} = RMSNormalization <epsilon = 1e-3> (x{i}, s{i})
   [l{i}_qkv] qkv{i} = MatMul (n{i}, w{i})
   [l{i}_split] q{i}, k{i}, v{i} = Split <axis = -1> (qkv{i}, parts)
   [l{i}_q] qr{i} = RotaryEmbedding <num_heads = 4> (q{i}, cos, sin, position_ids)
   [l{i}_k] kr{i} = RotaryEmbedding <num_heads = 2> (k{i}, cos, sin, position_ids)
   [l{i}_attention] y{i}, present_key_{i}, present_value_{i} = Attention
     <is_causal = 1, q_num_heads = 4, kv_num_heads = 2, left_window_size = 3>
     (qr{i}, kr{i}, v{i}, real, past_key_{i}, past_value_{i})
   [l{i}_out] o{i} = MatMul (y{i}, wo{i})
   [l{i}_residual] h{i} = Add (x{i}, o{i})
   [l{i}_norm2] m{i} = RMSNormalization <epsilon = 1e-3> (h{i}, t{i})
   [l{i}_gate] gate{i} = MatMul (m{i}, wg{i})
   [l{i}_up] up{i} = MatMul (m{i}, wu{i})
   [l{i}_swish] sw{i} = Swish (gate{i})
   [l{i}_gated] gated{i} = Mul (sw{i}, up{i})
   [l{i}_down] d{i} = MatMul (gated{i}, wd{i})
   [l{i}_residual2] x{j} = Add (h{i}, d{i})"""
ENCODER_LAYER: Final = """
   [l{i}_norm] n{i} = RMSNormalization <epsilon = 1e-3> (x{i}, s{i})
   [l{i}_qkv] qkv{i} = MatMul (n{i}, w{i})
   [l{i}_split] q{i}, k{i}, v{i} = Split <axis = -1> (qkv{i}, parts)
   [l{i}_attention] y{i} = Attention <q_num_heads = 4, kv_num_heads = 2> (q{i}, k{i}, v{i}, real)
   [l{i}_out] o{i} = MatMul (y{i}, wo{i})
   [l{i}_residual] x{j} = Add (x{i}, o{i})"""
SHAPES: Final = {
    "s": (HIDDEN,),
    "t": (HIDDEN,),
    "w": (HIDDEN, (HEADS + 2 * GROUPS) * WIDTH),
    "wo": (HIDDEN, HIDDEN),
    "wg": (HIDDEN, FEED),
    "wu": (HIDDEN, FEED),
    "wd": (FEED, HIDDEN),
}


def decoder(limit: int = LENGTH) -> Program:
    """Return a decoder of two layers with everything that the bugs need: groups, window, gates.

    Args:
        limit: The most tokens; with few, the matrix is small.
    """
    past = "".join(
        f"float[B,2,P,8] past_key_{i}, float[B,2,P,8] past_value_{i}, " for i in range(2)
    )
    present = "".join(
        f", float[B,2,T,8] present_key_{i}, float[B,2,T,8] present_value_{i}" for i in range(2)
    )
    shared = "float[64,4] cos, float[64,4] sin, "
    edge = f"int64[B,T] attention_mask, int64[B,S] position_ids, {past}{shared}"
    angles = np.arange(LENGTH)[:, None] * 10.0 ** (-np.arange(WIDTH // 2) / 2)
    tables = {"cos": np.cos(angles), "sin": np.sin(angles)}
    made = _made(edge, present, LAYER, tables)
    made.learn(model=replace(made.facts.model, max_length=limit))
    return made


def encoder() -> Program:
    """Return an encoder of two layers."""
    edge = "int64[B,S] attention_mask, "
    return _made(edge, "", ENCODER_LAYER, {})


def _made(edge: str, present: str, layer: str, tables: dict[str, np.ndarray]) -> Program:
    rng = np.random.default_rng(7)
    used = {name: shape for name, shape in SHAPES.items() if f"{name}{{i}}" in layer}
    arrays = {
        f"{name}{i}": rng.standard_normal(shape) / 3 + (len(shape) == 1)
        for name, shape in used.items()
        for i in range(2)
    }
    arrays |= {
        "table": rng.standard_normal((VOCABULARY, HIDDEN)),
        "head": rng.standard_normal((HIDDEN, VOCABULARY)),
        **tables,
    }
    kinds = "".join(
        f"float[{','.join(map(str, array.shape))}] {name}, "
        for name, array in arrays.items()
        if name not in tables
    ).rstrip(", ")
    text = f"""main (int64[B,S] input_ids, {edge}{kinds}) => (float[B,S,11] logits{present})
<int64[2] one_two = {{1,2}}, int64[3] parts = {{32,16,16}}>
{{
   real2 = Cast <to = 9> (attention_mask)
   [padding_mask] real = Unsqueeze (real2, one_two)
   x0 = Gather (table, input_ids){layer.format(i=0, j=1)}{layer.format(i=1, j=2)}
   logits = MatMul (x2, head)
}}"""
    made = bound(text, {name: array.astype(np.float32) for name, array in arrays.items()})
    made.learn(model=replace(made.facts.model, vocabulary=VOCABULARY, max_length=LENGTH))
    return made


def source_of(program: Program) -> Source:
    """Return a Program as a source: what it computes now is what it should."""
    return Source("tiny", program, SavedReference(program.clone()))


Edit = Callable[[Program, ir.Node], None]


@dataclass(frozen=True)
class Seeded(Pass):
    """Touches every node of an operator, all but one without harm.

    Args:
        op_type: The operator.
        edit: What is wrong.
        wrong: The node that it is done to.
    """

    name: ClassVar[str] = "seeded"
    op_type: str = ""
    edit: Edit = lambda *_: None
    wrong: str = ""

    @override
    def run(self, program: Program) -> Outcome:
        outcome = Outcome()
        for node in g.nodes(program.graph, self.op_type):
            if node.name == self.wrong:
                self.edit(program, node)
            else:
                _harmless(node)
            outcome.hit()
        g.remove_dead(program.model)
        program.graph.sort()
        return outcome


def _harmless(node: ir.Node) -> None:
    value = g.operand(node, 0)
    copy = g.Builder(node).op("Identity", [value], name=f"{node.name}.copy")
    copy.shape, copy.type = value.shape, value.type
    node.replace_input_with(0, copy)


@dataclass(frozen=True)
class Rounds(RoundingPass):
    """Makes a weight 10 % larger, and says that it does nothing."""

    name: ClassVar[str] = "rounds"

    @override
    def run(self, program: Program) -> Outcome:
        value = program.graph.initializers["head"]
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.1))
        return Outcome(applied=1)

    @override
    def rounding(self, program: Program, after: Rounding) -> Rounding:
        return after


def wrong_scale(_: Program, node: ir.Node) -> None:
    node.attributes["scale"] = ir.AttrFloat32("scale", 1.1 * WIDTH**-0.5)


def dropped_mask(_: Program, node: ir.Node) -> None:
    node.replace_input_with(3, None)


def rotary_off_by_one(_: Program, node: ir.Node) -> None:
    build, positions = g.Builder(node), g.operand(node, 3)
    later = build.op("Add", [positions, build.constant(1, "int64")])
    g_limit = build.op("Min", [later, build.constant(LENGTH - 1, "int64")])
    for value in (later, g_limit):
        value.shape, value.type = positions.shape, positions.type
    node.replace_input_with(3, g_limit)


def transposed_weight(program: Program, node: ir.Node) -> None:
    tensor = g.weight(node.inputs[1])
    assert tensor is not None
    turned = g.add_initializer(program.graph, "turned", weights.transposed(tensor))
    node.replace_input_with(1, turned)


def swapped_gate_and_up(_: Program, node: ir.Node) -> None:
    (product,) = g.users(node.outputs[0])
    gate, up = g.operand(node, 0), g.operand(product, 1)
    node.replace_input_with(0, up)
    product.replace_input_with(1, gate)


def wrong_epsilon(_: Program, node: ir.Node) -> None:
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-1)


def wrong_group(_: Program, node: ir.Node) -> None:
    build, keys = g.Builder(node), g.operand(node, 1)
    halves = build.ops(
        "Split", [keys, build.constant([WIDTH, WIDTH], "int64")], {"axis": -1}, outputs=2
    )
    swapped = build.op("Concat", [halves[1], halves[0]], {"axis": -1})
    swapped.shape, swapped.type = keys.shape, keys.type
    node.replace_input_with(1, swapped)


def window_off_by_one(_: Program, node: ir.Node) -> None:
    node.attributes["left_window_size"] = ir.AttrInt64("left_window_size", 4)


def causal(_: Program, node: ir.Node) -> None:
    node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)


def inverted_left_padding(_: Program, node: ir.Node) -> None:
    build, mask = g.Builder(node), g.operand(node, 3)
    ends = [build.constant([number], "int64") for number in (0, 1, 3)]
    first = build.op("Slice", [mask, *ends])
    turned = build.op("Where", [first, mask, build.op("Not", [mask])])
    turned.shape, turned.type = mask.shape, mask.type
    node.replace_input_with(3, turned)


def dropped_residual(_: Program, node: ir.Node) -> None:
    g.replace(node.outputs[0], g.operand(node, 1))


BUGS: Final[dict[str, tuple[str, Seeded]]] = {
    "a wrong scale in attention": ("decoder", Seeded("Attention", wrong_scale, "l1_attention")),
    "a dropped mask": ("decoder", Seeded("Attention", dropped_mask, "l1_attention")),
    "an off-by-one in a rotary offset": (
        "decoder",
        Seeded("RotaryEmbedding", rotary_off_by_one, "l1_q"),
    ),
    "a transposed square weight": ("decoder", Seeded("MatMul", transposed_weight, "l1_out")),
    "swapped gate and up": ("decoder", Seeded("Swish", swapped_gate_and_up, "l1_swish")),
    "epsilon 100 times as large": ("decoder", Seeded("RMSNormalization", wrong_epsilon, "l1_norm")),
    "the wrong group of keys": ("decoder", Seeded("Attention", wrong_group, "l1_attention")),
    "a window off by one": ("decoder", Seeded("Attention", window_off_by_one, "l1_attention")),
    "a causal encoder": ("encoder", Seeded("Attention", causal, "l1_attention")),
    "padding inverted on the left": (
        "encoder",
        Seeded("Attention", inverted_left_padding, "l1_attention"),
    ),
    "a dropped residual": ("decoder", Seeded("Add", dropped_residual, "l1_residual")),
}
"""By what is wrong: the Program, and the pass."""
