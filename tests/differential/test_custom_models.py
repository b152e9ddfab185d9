"""Models written by hand, in every form that a file can give them, against themselves in torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmopt.backends import find_backend
from llmopt.backends.base import Demand
from llmopt.frontend.base import SourceOptions
from llmopt.frontend.source import open_source
from llmopt.frontend.torch.module import load_factory
from llmopt.frontend.torch.trace import quiet
from llmopt.ir.feeds import Case, feeds
from llmopt.ir.program import Program
from llmopt.passes.pipeline import Pipeline, Ran

MODELS = Path(__file__).parents[1] / "models"
DYNAMIC = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
INPUTS = {"gpt": ["idx"], "bert": ["input_ids", "attention_mask", "token_type_ids"]}
TASKS = {"gpt": "generate", "bert": "encode"}
LIMITS = {"gpt": 64, "bert": 48}
TOLERANCE = 1e-4  # relative, float32, six products deep
CASES = [
    Case(batch, new, 0, padding, seed=new)
    for batch in (1, 3)
    for new in (1, 7, 33)
    for padding in ("none", "left", "right")
]
Form = tuple[Any, SourceOptions]


def examples(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.ones(2, 7, dtype=torch.int64) for key in INPUTS[name]}


def factory(name: str, _: Path) -> Form:
    return f"{MODELS / name}.py:make", SourceOptions()


def module(name: str, _: Path) -> Form:
    return load_factory(f"{MODELS / name}.py:make"), SourceOptions()


def pt2(name: str, folder: Path) -> Form:
    dynamic = dict.fromkeys(INPUTS[name], DYNAMIC)
    made = load_factory(f"{MODELS / name}.py:make").eval()
    with quiet():
        program = torch.export.export(made, (), examples(name), dynamic_shapes=dynamic)
        torch.export.save(program, folder / "model.pt2")
    return folder / "model.pt2", SourceOptions()


def torchscript(name: str, folder: Path) -> Form:
    made = load_factory(f"{MODELS / name}.py:make").eval()
    with quiet():
        script = torch.jit.trace(  # type: ignore[no-untyped-call]
            made, tuple(examples(name).values()), strict=False
        )
        script.save(str(folder / "model.pt"))
    return folder / "model.pt", SourceOptions()


def state_dict(name: str, folder: Path) -> Form:
    torch.save(load_factory(f"{MODELS / name}.py:make").state_dict(), folder / "model.pth")
    return folder / "model.pth", SourceOptions(model=f"{MODELS / name}.py:make")


def pickled(name: str, folder: Path) -> Form:
    torch.save(load_factory(f"{MODELS / name}.py:make"), folder / "model.pt")
    return folder / "model.pt", SourceOptions(trust_pickle=True)


def onnx(opset: int) -> Callable[[str, Path], Form]:
    """Return a form: opset 17 by the exporter of old, later ones by the one of today."""

    def export(name: str, folder: Path) -> Form:
        path = folder / "model.onnx"
        made = load_factory(f"{MODELS / name}.py:make").eval()
        given = tuple(examples(name).values())
        old: dict[str, Any] = {
            "dynamic_axes": {key: {0: "batch", 1: "sequence"} for key in [*INPUTS[name], "out"]},
            "output_names": ["out"],
        }
        new: dict[str, Any] = {
            "dynamic_shapes": (DYNAMIC,) * len(given),
            "external_data": True,
            "verbose": False,
        }
        with quiet():
            torch.onnx.export(
                made,
                given,
                path,
                input_names=INPUTS[name],
                opset_version=opset,
                dynamo=opset > 17,
                **(new if opset > 17 else old),
            )
        return path, SourceOptions()

    export.__name__ = f"onnx-{opset}"
    return export


FORMS = [
    factory,
    pt2,
    onnx(20),
    # the same trace as a factory's, or nearly the same file, or a tracer that torch gave up
    *(
        pytest.param(form, marks=pytest.mark.thorough)
        for form in (module, state_dict, pickled, onnx(17), onnx(18), torchscript)
    ),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("name", ["gpt", "bert"])
def test_every_form_of_a_model_is_fused_and_computes_what_it_did(
    name: str, form: Callable[[str, Path], Form], tmp_path: Path
) -> None:
    source = open_source(*form(name, tmp_path))
    program = source.program
    assert program.facts.task == TASKS[name]
    assert program.facts.max_length == LIMITS[name]
    assert program.facts.expected["attention"] == 2
    assert program.facts.expected["norm"] == 5
    misses: list[str] = []

    def note(_pass: object, _program: Program, ran: Ran) -> None:
        misses.extend(f"{m.node}: {m.reason}" for m in ran.missed if m.kind != "mask")

    Pipeline.parse("default,-add-kv-cache").run(program, note)  # compared output by output
    operators = [node.op_type for node in program.graph]
    assert not misses
    assert operators.count("Attention") == 2
    assert operators.count("LayerNormalization") == 5
    assert not {"Softmax", "Sqrt", "ReduceMean"} & set(operators)
    backend = find_backend("cpu")
    Pipeline(backend.passes(None)).run(program)
    backend.write(program, tmp_path, Demand())
    assert worst(source.reference, program, tmp_path / "model.onnx") <= TOLERANCE


def worst(reference: Any, program: Program, path: Path) -> float:
    """Return the greatest relative error over unpadded positions of all cases."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options)
    names = [output.name for output in session.get_outputs()]
    arrays = [feeds(program.signature, case, program.facts.model.vocabulary) for case in CASES]
    errors = []
    for case, fed, wanted in zip(CASES, arrays, reference.run(arrays), strict=True):
        found = dict(zip(names, session.run(None, fed), strict=True))
        assert found.keys() == wanted.keys()
        rows = case.mask() == 1
        for key, want in wanted.items():
            assert found[key].shape == want.shape
            assert found[key].dtype == want.dtype
            a, b = found[key][rows], want[rows]
            errors.append(float(np.abs(a - b).max() / np.abs(b).max()))
    return max(errors)
