"""Tiny artifacts for the runtime's tests, and the same models in numpy to compare with."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llmopt.artifact.manifest import Manifest
from llmopt.interface.facts import CacheKind, ModelFacts
from llmopt.interface.signature import Port, Role, Signature

Array = npt.NDArray[Any]

HEADS, GROUPS, WIDTH, HIDDEN, LAYERS, MAX_LENGTH = 4, 2, 8, 12, 2, 48
EOS, PAD, VOCABULARY = 256, 257, 258


@dataclass(frozen=True)
class TinyDecoder:
    """A decoder with learned positions and one projection after each attention.

    Args:
        cache: How its artifact keeps the cache.
        maskless: Whether it takes tokens alone.
        keep: Whether it has ``logits_to_keep``.
    """

    cache: CacheKind = "shared"
    maskless: bool = False
    keep: bool = True
    weights: dict[str, Array] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        """Draw the weights."""
        random = np.random.default_rng(7)
        shapes = {"embed": (VOCABULARY, HIDDEN), "place": (MAX_LENGTH, HIDDEN)}
        shapes["head"] = (HIDDEN, VOCABULARY)
        for i in range(LAYERS):
            shapes |= {
                f"q{i}": (HIDDEN, HEADS * WIDTH),
                f"k{i}": (HIDDEN, GROUPS * WIDTH),
                f"v{i}": (HIDDEN, GROUPS * WIDTH),
                f"o{i}": (HEADS * WIDTH, HIDDEN),
            }
        for name, shape in shapes.items():
            self.weights[name] = random.normal(0, 0.6, shape).astype(np.float32)

    def logits(self, tokens: Array, mask: Array | None = None) -> Array:
        """Return [B, S, V] computed at once, in float64."""
        w = {name: value.astype(np.float64) for name, value in self.weights.items()}
        mask = np.ones_like(tokens) if mask is None else mask
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
        x = w["embed"][tokens] + (0 if self.maskless else w["place"][positions])
        length = tokens.shape[1]
        seen = np.tril(np.ones((length, length))) * mask[:, None, :]
        for i in range(LAYERS):
            q, k, v = (self._split(x @ w[f"{n}{i}"]) for n in "qkv")
            k, v = (np.repeat(a, HEADS // GROUPS, axis=1) for a in (k, v))
            scores = q @ k.swapaxes(-1, -2) / np.sqrt(WIDTH)
            scores = np.where(seen[:, None] > 0, scores, -1e9)
            powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
            mixed = powers / powers.sum(axis=-1, keepdims=True) @ v
            x = x + mixed.swapaxes(1, 2).reshape(*tokens.shape, -1) @ w[f"o{i}"]
        out: Array = x @ w["head"]
        return out

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """Return ``count`` likeliest tokens, or fewer where one is EOS."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(np.array([tokens]))[0, -1].argmax()))
            if tokens[-1] == EOS:
                break
        return tokens[len(prompt) :]

    def write(self, folder: Path, **facts: Any) -> Path:
        """Write the artifact to ``folder`` and return it."""
        folder.mkdir(parents=True, exist_ok=True)
        signature = self.signature()
        onnx.save(self._model(signature), folder / "model.onnx")
        write_tokenizer(folder)
        model = ModelFacts(
            family="tiny",
            layers=LAYERS,
            heads=HEADS,
            kv_heads=GROUPS,
            head_width=WIDTH,
            hidden=HIDDEN,
            vocabulary=VOCABULARY,
            max_length=MAX_LENGTH,
            eos=(EOS,),
            pad=PAD,
            cache=self.cache,
        )
        manifest = Manifest(
            target="onnxruntime-cpu",
            entry="model.onnx",
            task="generate",
            signature=signature,
            model=replace(model, **facts),
        )
        manifest.with_files(folder).write(folder)
        return folder

    def signature(self) -> Signature:
        """Return its inputs and outputs."""
        inputs = [Port("input_ids", Role.TOKENS, "int64", ("B", "S"))]
        if not self.maskless:
            inputs.append(Port("attention_mask", Role.MASK, "int64", ("B", "T")))
            inputs.append(Port("position_ids", Role.POSITIONS, "int64", ("B", "S")))
        outputs = [Port("logits", Role.LOGITS, "float32", ("B", "K", "V"))]
        if self.cache != "none":
            for i in range(LAYERS):
                for part in ("key", "value"):
                    past, present = f"past_key_values.{i}.{part}", f"present.{i}.{part}"
                    shape = ("B", GROUPS, "P", WIDTH)
                    inputs.append(Port(past, Role(f"past_{part}"), "float32", shape, i))
                    shape = ("B", GROUPS, "T", WIDTH)
                    outputs.append(Port(present, Role(f"present_{part}"), "float32", shape, i))
        if self.keep:
            inputs.append(Port("logits_to_keep", Role.LOGITS_TO_KEEP, "int64", ()))
        return Signature(tuple(inputs), tuple(outputs))

    def _split(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], -1, WIDTH).swapaxes(1, 2)

    def _model(self, signature: Signature) -> onnx.ModelProto:
        graph = _Graph()
        for name, value in self.weights.items():
            graph.constant(name, value)
        x = self._embed(graph)
        bias, total, seqlens = self._lengths(graph)
        for i in range(LAYERS):
            q, k, v = (graph.add("MatMul", [x, f"{n}{i}"]) for n in "qkv")
            pasts = [f"past_key_values.{i}.{part}" for part in ("key", "value")]
            presents = [f"present.{i}.{part}" for part in ("key", "value")]
            if self.cache == "none":
                pasts, presents = ["", ""], [f"unused_key{i}", f"unused_value{i}"]
            inputs = [q, k, v, *pasts, seqlens, total, "", "", "", bias]
            mixed = f"mixed{i}"
            graph.nodes.append(
                helper.make_node(
                    "GroupQueryAttention",
                    inputs,
                    [mixed, *presents],
                    domain="com.microsoft",
                    num_heads=HEADS,
                    kv_num_heads=GROUPS,
                )
            )
            x = graph.add("Add", [x, graph.add("MatMul", [mixed, f"o{i}"])])
        self._head(graph, x)
        return graph.model(signature, optional={"logits_to_keep": np.array(1, np.int64)})

    def _embed(self, graph: _Graph) -> str:
        x = graph.add("Gather", ["embed", "input_ids"])
        if self.maskless:
            return x
        return graph.add("Add", [x, graph.add("Gather", ["place", "position_ids"])])

    def _lengths(self, graph: _Graph) -> tuple[str, str, str]:
        """Return attention bias [B, 1, S, T], total length, and length - 1 of each row."""
        where = "input_ids" if self.maskless else "attention_mask"
        one = graph.constant("one", np.array([1], np.int64))
        shape = graph.add("Shape", [where])
        total = graph.add("Gather", [shape, graph.constant("dim", np.array(1, np.int64))])
        if self.maskless and self.cache != "none":
            past = graph.add("Shape", ["past_key_values.0.key"], start=2, end=3)
            total = graph.add("Add", [total, graph.add("Squeeze", [past])])
        total = graph.add("Cast", [total], to=TensorProto.INT32)
        last = graph.add("Sub", [total, graph.constant("one32", np.array(1, np.int32))])
        rows = graph.add("Shape", ["input_ids"], start=0, end=1)
        seqlens = graph.add("Expand", [last, rows])
        if self.maskless:
            return "", total, seqlens
        real = graph.add("Cast", ["attention_mask"], to=TensorProto.FLOAT)
        hidden = graph.add("Sub", [real, graph.constant("onef", np.array(1, np.float32))])
        bias = graph.add("Mul", [hidden, graph.constant("huge", np.array(1e9, np.float32))])
        axes = graph.constant("axes", np.array([1, 2], np.int64))
        bias = graph.add("Unsqueeze", [bias, axes])
        new = graph.add("Shape", ["input_ids"], start=1, end=2)
        full = graph.add("Concat", [rows, one, new, one], axis=0)
        return graph.add("Expand", [bias, full]), total, seqlens

    def _head(self, graph: _Graph, x: str) -> None:
        if self.keep:
            start = graph.add("Neg", ["logits_to_keep"])
            shape = graph.constant("flat", np.array([1], np.int64))
            start = graph.add("Reshape", [start, shape])
            end = graph.constant("end", np.array([2**31], np.int64))
            axis = graph.constant("axis", np.array([1], np.int64))
            x = graph.add("Slice", [x, start, end, axis])
        graph.nodes.append(helper.make_node("MatMul", [x, "head"], ["logits"]))


class _Graph:
    """Nodes and constants, by the way they are added."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def add(self, op: str, inputs: list[str], **attributes: Any) -> str:
        """Add a node and return the name of its output."""
        name = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def constant(self, name: str, value: Array) -> str:
        """Add a constant and return its name."""
        self.constants[name] = onnx.numpy_helper.from_array(value, name)
        return name

    def model(self, signature: Signature, optional: dict[str, Array]) -> onnx.ModelProto:
        """Return the model with these inputs and outputs."""
        named = {port.name for port in signature.inputs}
        defaults = [onnx.numpy_helper.from_array(v, n) for n, v in optional.items() if n in named]
        graph = helper.make_graph(
            self.nodes,
            "tiny",
            list(map(_value, signature.inputs)),
            list(map(_value, signature.outputs)),
            [*self.constants.values(), *defaults],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _value(port: Port) -> onnx.ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(port.dtype))
    return helper.make_tensor_value_info(port.name, kind, list(port.shape))


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer whose token b is the byte b."""
    alphabet = byte_alphabet()
    backend = Tokenizer(models.BPE({char: byte for byte, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>", "<pad>"])
    backend.enable_truncation(8)  # as files of sentence encoders have it
    backend.enable_padding(length=8)
    (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")


def byte_alphabet() -> list[str]:
    """Return the character that stands for each byte in byte-level BPE."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def rewrite_manifest(folder: Path, **changes: Any) -> None:
    """Change keys of an artifact's manifest; ``None`` deletes one."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text(encoding="utf-8")) | changes
    kept = {key: value for key, value in data.items() if value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")


@dataclass(frozen=True)
class TinyEncoder:
    """An encoder that adds each token's row to the mean row of its sentence.

    Args:
        pooling: The manifest's pooling, where the model has no embedding output.
        embedding: Whether the model pools by itself.
        max_length: Most tokens it takes.
    """

    pooling: str | None = None
    embedding: bool = True
    max_length: int = 16
    table: Array = field(
        default_factory=lambda: np.random.default_rng(3).normal(size=(VOCABULARY, HIDDEN)),
        compare=False,
    )

    def hidden(self, tokens: list[int]) -> Array:
        """Return [S, E] of one sentence, in float64."""
        rows = self.table[tokens]
        out: Array = rows + rows.mean(axis=0)
        return out

    def signature(self) -> Signature:
        """Return its inputs and outputs."""
        inputs = (
            Port("input_ids", Role.TOKENS, "int64", ("B", "S")),
            Port("attention_mask", Role.MASK, "int64", ("B", "S")),
            Port("token_type_ids", Role.TOKEN_TYPES, "int64", ("B", "S")),
        )
        outputs = [Port("last_hidden_state", Role.HIDDEN, "float32", ("B", "S", HIDDEN))]
        if self.embedding:
            outputs.append(Port("sentence_embedding", Role.EMBEDDING, "float32", ("B", HIDDEN)))
        return Signature(inputs, tuple(outputs))

    def write(self, folder: Path) -> Path:
        """Write the artifact to ``folder`` and return it."""
        folder.mkdir(parents=True, exist_ok=True)
        signature = self.signature()
        onnx.save(self._model(signature), folder / "model.onnx")
        write_tokenizer(folder)
        facts = ModelFacts(
            hidden=HIDDEN,
            vocabulary=VOCABULARY,
            max_length=self.max_length,
            pad=PAD,
            pooling=self.pooling,
        )
        manifest = Manifest(
            target="onnxruntime-cpu",
            entry="model.onnx",
            task="embed",
            signature=signature,
            model=facts,
        )
        manifest.with_files(folder).write(folder)
        return folder

    def _model(self, signature: Signature) -> onnx.ModelProto:
        graph = _Graph()
        graph.constant("table", self.table.astype(np.float32))
        graph.constant("last", np.array([2], np.int64))
        graph.constant("one", np.array([1], np.int64))
        rows = graph.add("Gather", ["table", "input_ids"])
        types = graph.add("Cast", ["token_type_ids"], to=TensorProto.FLOAT)
        rows = graph.add("Add", [rows, graph.add("Unsqueeze", [types, "last"])])
        real = graph.add("Cast", ["attention_mask"], to=TensorProto.FLOAT)
        real = graph.add("Unsqueeze", [real, "last"])
        mean = self._mean(graph, rows, real)
        graph.nodes.append(helper.make_node("Add", [rows, mean], ["last_hidden_state"]))
        if self.embedding:
            pooled = self._mean(graph, "last_hidden_state", real)
            graph.nodes.append(helper.make_node("Squeeze", [pooled, "one"], ["sentence_embedding"]))
        return graph.model(signature, optional={})

    def _mean(self, graph: _Graph, rows: str, real: str) -> str:
        total = graph.add("ReduceSum", [graph.add("Mul", [rows, real]), "one"], keepdims=1)
        return graph.add("Div", [total, graph.add("ReduceSum", [real, "one"], keepdims=1)])
