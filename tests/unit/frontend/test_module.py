"""Modules and factories: inputs, outputs, task and limits are found out, or asked for."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

from llmopt.errors import (
    PickleRefusedError,
    SourceError,
    SourceNotFoundError,
    UnknownNameError,
    UnsupportedModelError,
    UsageError,
)
from llmopt.frontend.base import Source, SourceOptions
from llmopt.frontend.source import open_source
from llmopt.frontend.tensors import to_numpy
from llmopt.frontend.torch.examples import example_inputs, free_axes, load_arrays
from llmopt.frontend.torch.module import call_factory, digest, load_factory, open_module
from llmopt.frontend.torch.outputs import output_names
from llmopt.interface.signature import Role

VOCABULARY, HIDDEN = 11, 6


class Tagger(nn.Module):
    """Embeds tokens, mixes them along the sequence or not, and maps to ``width``."""

    def __init__(self, width: int = HIDDEN, *, causal: bool = False, mixes: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table = nn.Embedding(VOCABULARY, HIDDEN)
        self.out = nn.Linear(HIDDEN, width)
        self.causal, self.mixes = causal, mixes

    @override
    def forward(self, input_ids: Tensor) -> Any:
        x = self.table(input_ids)
        if self.mixes:
            x = x.cumsum(1) if self.causal else x + x.mean(1, keepdim=True)
        return self.out(x)


class Masked(Tagger):
    """Takes a mask and positions, and returns two things by name."""

    @override
    def forward(  # type: ignore[override]
        self, ids: Tensor, mask: Tensor, position_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        x = self.table(ids) * mask[..., None]
        if position_ids is not None:
            x = x + position_ids[..., None]
        return {"last_hidden_state": self.out(x + x.mean(1, keepdim=True)), "pooled": x.mean(1)}


def opened(module: nn.Module, **options: Any) -> Source:
    return open_module(module, SourceOptions(**options))


def roles(source: Source) -> list[tuple[str, str]]:
    signature = source.program.signature
    return [(p.name, str(p.role)) for p in (*signature.inputs, *signature.outputs)]


@pytest.mark.parametrize(
    ("module", "task", "output"),
    [
        (Tagger(VOCABULARY, causal=True), "generate", ("logits", "logits")),
        (Tagger(VOCABULARY + 5, causal=True), "generate", ("logits", "logits")),
        (Tagger(HIDDEN, causal=True), "encode", ("last_hidden_state", "hidden")),
        (Tagger(HIDDEN), "encode", ("last_hidden_state", "hidden")),
        (Tagger(VOCABULARY), "encode", ("logits", "logits")),  # a masked language model
    ],
)
def test_task_follows_from_what_later_tokens_move(
    module: nn.Module, task: str, output: tuple[str, str]
) -> None:
    source = opened(module)
    assert source.program.facts.task == task
    assert roles(source) == [("input_ids", "tokens"), output]


def test_names_of_inputs_and_outputs_are_kept_and_dimensions_named() -> None:
    source = opened(Masked())
    assert roles(source) == [
        ("ids", "tokens"),
        ("mask", "mask"),
        ("last_hidden_state", "hidden"),
        ("pooled", "other"),
    ]
    assert [p.shape for p in source.program.signature.inputs] == [("B", "S"), ("B", "S")]
    assert [p.shape for p in source.program.signature.outputs] == [
        ("B", "S", HIDDEN),
        ("B", HIDDEN),
    ]


def test_a_module_is_left_in_the_mode_it_was_in() -> None:
    module = Tagger().train()
    module.out.eval()
    source = opened(module)
    next(source.reference.run([{"input_ids": np.ones((2, 3), np.int64)}]))
    assert module.training
    assert module.table.training
    assert not module.out.training
    assert "training mode" in source.notes[0]
    assert opened(Tagger().eval()).notes == ()


def test_the_reference_takes_changed_parameters_for_a_while() -> None:
    module = Tagger(mixes=False).eval()
    source = opened(module)
    batch = {"input_ids": np.arange(6).reshape(2, 3)}

    def zeroed(name: str, array: np.ndarray) -> np.ndarray:
        return np.zeros_like(array) if name == "out.weight" else array

    (changed,) = source.reference.run([batch], zeroed)
    (plain,) = source.reference.run([batch])
    bias = to_numpy(module.out.bias)
    np.testing.assert_array_equal(
        changed["last_hidden_state"], np.broadcast_to(bias, (2, 3, HIDDEN))
    )
    assert np.abs(plain["last_hidden_state"] - bias).max() > 0


def test_facts_come_from_tables_and_options_only_shorten() -> None:
    class Placed(Tagger):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Embedding(20, HIDDEN)

        def forward(self, input_ids: Tensor) -> Any:
            places = torch.arange(input_ids.shape[1]) + 2  # as RoBERTa leaves two rows out
            return self.out(self.table(input_ids) + self.places(places))

    model = opened(Placed()).program.facts.model
    assert (model.vocabulary, model.hidden, model.max_length) == (VOCABULARY, HIDDEN, 18)
    assert opened(Placed(), max_length=9).program.facts.max_length == 9
    assert opened(Placed(), max_length=900).program.facts.max_length == 18
    assert opened(Tagger()).program.facts.max_length == 512


def test_a_task_that_the_model_is_not_for_is_refused() -> None:
    with pytest.raises(UsageError, match="not causal"):
        opened(Tagger(), task="generate")
    with pytest.raises(UnknownNameError):
        opened(Tagger(), task="sing")
    assert opened(Tagger(), task="raw").program.facts.task == "raw"
    embed = opened(Tagger(), task="embed").program.facts
    assert (embed.task, embed.model.pooling) == ("embed", "mean")


def test_a_dimension_that_the_module_fixes_is_an_error_and_never_silent() -> None:
    class Fixed(Tagger):
        def forward(self, input_ids: Tensor) -> Any:
            return self.out(self.table(input_ids).view(2, 7, HIDDEN))

    with pytest.raises(UnsupportedModelError, match=r"torch\.export failed"):
        opened(Fixed())
    static = {"input_ids": {0: torch.export.Dim.DYNAMIC}}
    with pytest.raises(UnsupportedModelError, match="'input_ids' is fixed"):
        opened(Tagger(), dynamic_shapes=static)


def test_what_cannot_be_traced_is_refused_with_a_reason() -> None:
    class Odd(Tagger):
        def forward(self, input_ids: Tensor) -> Any:
            return self.out(self.table(input_ids)), "done"

    with pytest.raises(UnsupportedModelError, match="returns a str"):
        opened(Odd())
    with pytest.raises(UnsupportedModelError, match="meta device"):
        opened(Tagger().to("meta"))


def test_features_of_a_raw_model_stay_fixed_and_are_noted() -> None:
    module = nn.Sequential(nn.Linear(5, 4), nn.ReLU()).eval()
    with pytest.raises(UsageError, match="--example-inputs"):
        opened(module)
    source = opened(module, example_inputs=[np.zeros((1, 5), np.float32)])
    assert source.program.facts.task == "raw"
    assert source.program.signature.inputs[0].shape == ("B", 5)
    assert "fixed at [5]" in source.notes[0]
    assert roles(source) == [("input", "other"), ("output_0", "other")]


def test_example_inputs_are_given_by_name_in_order_or_by_file(tmp_path: Path) -> None:
    ids, mask = np.ones((2, 3), np.int64), np.ones((2, 3), np.int64)
    np.savez(tmp_path / "in.npz", ids=ids, mask=mask)
    for given in ({"ids": ids, "mask": mask}, [ids, torch.ones(2, 3)], tmp_path / "in.npz"):
        found = example_inputs(Masked(), SourceOptions(example_inputs=given))
        assert isinstance(found, dict)
        assert {name: tuple(t.shape) for name, t in found.items()} == {
            "ids": (2, 3),
            "mask": (2, 3),
        }
    with pytest.raises(UsageError, match="lack mask"):
        example_inputs(Masked(), SourceOptions(example_inputs={"ids": ids}))
    given = {"ids": ids, "mask": mask, "other": ids}
    with pytest.raises(UsageError, match="unknown other"):
        example_inputs(Masked(), SourceOptions(example_inputs=given))
    with pytest.raises(UsageError, match="is a str"):
        example_inputs(Masked(), SourceOptions(example_inputs={"ids": "a", "mask": mask}))


def test_a_batch_of_one_is_repeated_since_torch_would_fix_it() -> None:
    found = example_inputs(Tagger(), SourceOptions(example_inputs=[np.ones((1, 4), np.int64)]))
    assert isinstance(found, dict)
    assert found["input_ids"].shape == (2, 4)


def test_inputs_that_cannot_be_guessed_are_asked_for() -> None:
    class Unknown(Tagger):
        def forward(self, input_ids: Tensor, gate: Tensor) -> Any:  # type: ignore[override]
            return self.out(self.table(input_ids)) * gate

    class Broken(Tagger):
        def forward(self, input_ids: Tensor) -> Any:
            raise RuntimeError(f"never {len(input_ids)}")

    with pytest.raises(UsageError, match=r"cannot infer the input 'gate'; pass --example-inputs"):
        opened(Unknown())
    with pytest.raises(UsageError, match="RuntimeError: never"):
        opened(Broken())


def test_optional_inputs_that_break_the_module_are_left_out() -> None:
    class Picky(Tagger):
        def forward(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Any:
            if token_type_ids is not None:
                raise ValueError("no table for them")
            return self.out(self.table(input_ids))

    assert roles(opened(Picky()))[0] == ("input_ids", "tokens")


def test_modules_with_star_arguments_are_called_in_order() -> None:
    class Star(Tagger):
        def forward(self, *given: Tensor) -> Any:
            return self.out(self.table(given[0])) * given[1][..., None]

    ids = np.ones((2, 3), np.int64)
    gates = np.ones((2, 3), np.float32)
    source = opened(Star(), example_inputs=[ids, gates])
    (out,) = source.reference.run(
        [{p.name: ids.astype(p.dtype) for p in source.program.signature.inputs}]
    )
    assert next(iter(out.values())).shape == (2, 3, HIDDEN)


def test_masks_of_four_axes_are_free_where_they_are_as_long_as_the_tokens() -> None:
    inputs = {"x": torch.ones(2, 7, dtype=torch.int64), "mask": torch.ones(2, 1, 7, 7)}
    assert free_axes("mask", inputs["mask"], inputs) == [0, 2, 3]
    assert free_axes("pixels", torch.ones(2, 3, 7, 7), inputs) == [0]
    assert free_axes("hidden", torch.ones(2, 7, 5), inputs) == [0, 1]
    assert free_axes("scale", torch.ones(5), inputs) == []


def test_pickled_and_damaged_arrays_are_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "executed").touch, ())

    path = tmp_path / "evil.npz"
    np.savez(path, ids=np.array([Payload()], dtype=object))
    (tmp_path / "executed").unlink(missing_ok=True)
    with pytest.raises(PickleRefusedError):
        opened(Tagger(), example_inputs=path)
    assert not (tmp_path / "executed").exists()
    np.savez(tmp_path / "cut.npz", ids=np.zeros(100))
    whole = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match=r"not an \.npz"):
        load_arrays(tmp_path / "cut.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(SourceError, match="without a name"):
        load_arrays(tmp_path / "one.npy")
    with pytest.raises(SourceNotFoundError):
        load_arrays(tmp_path / "none.npz")


def test_outputs_are_named_by_where_they_are() -> None:
    x = torch.zeros(1)
    pair = namedtuple("pair", ["logits", "state"])  # noqa: PYI024 - as torch returns them

    @dataclasses.dataclass
    class Result:
        loss: Tensor | None
        logits: Tensor

    assert output_names(x, "m") == [""]
    assert output_names((x, None, x), "m") == ["", ""]
    assert output_names(OrderedDict(a=x, b=[x, x]), "m") == ["a", "b.0", "b.1"]
    assert output_names(pair(x, (x, x)), "m") == ["logits", "state.0", "state.1"]
    assert output_names(Result(None, x), "m") == ["logits"]


def test_the_digest_knows_names_shapes_and_numbers() -> None:
    module = Tagger()
    before = digest(module)
    assert digest(Tagger()) == before
    with torch.no_grad():
        module.out.bias[0] += 1
    assert digest(module) != before


def factory(path: Path, text: str) -> str:
    path.write_text("from torch import nn, ones\n" + text)
    return f"{path}:make"


def test_a_factory_may_say_what_to_trace_with(tmp_path: Path) -> None:
    (tmp_path / "width_of_it.py").write_text("WIDTH = 4\n")
    text = "from width_of_it import WIDTH\ndef make(): return nn.Linear(5, WIDTH), [ones(2, 5)]\n"
    source = open_source(factory(tmp_path / "raw_model.py", text), SourceOptions())
    assert source.name == "raw_model"
    assert source.program.signature.outputs[0].shape == ("B", 4)


def test_a_factory_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "made.py"
    with pytest.raises(SourceNotFoundError, match=r"made\.py: not found"):
        load_factory(f"{path}:make")
    with pytest.raises(UsageError, match="does not name a factory"):
        call_factory(str(path))
    with pytest.raises(UsageError, match="it has"):
        load_factory(factory(path, "def other(): pass\n"))
    with pytest.raises(UsageError, match="not callable"):
        load_factory(factory(path, "make = 3\n"))
    with pytest.raises(UsageError, match="returned a dict"):
        load_factory(factory(path, "def make(): return {}\n"))
    with pytest.raises(SourceError, match="cannot be imported: SyntaxError"):
        load_factory(factory(path, "def make(:\n"))
    with pytest.raises(SourceError, match=r"make\(\) failed: ValueError: no"):
        load_factory(factory(path, "def make(): raise ValueError('no')\n"))
    assert isinstance(load_factory(factory(path, "make = nn.Linear(2, 2)\n")), nn.Linear)


def test_roles_are_told_by_name() -> None:
    from llmopt.frontend.input_names import role_of

    assert role_of("attention_mask") is Role.MASK
    assert role_of("segment_ids") is Role.TOKEN_TYPES
    assert role_of("key_padding_mask") is None  # it marks padding with 1, not tokens
