"""Files of PyTorch: nothing in them is executed, damage is one line, weights must be complete."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typing_extensions import override

from llmopt.errors import PickleRefusedError, SourceError, UnsupportedModelError, UsageError
from llmopt.frontend.base import SourceOptions
from llmopt.frontend.source import open_source
from llmopt.frontend.torch.module import load_factory
from llmopt.frontend.torch.pt2 import harmless
from llmopt.frontend.torch.trace import quiet

MODEL = """
import torch
from torch import Tensor, nn

class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.out = nn.Linear(6, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.out(x + x.mean(1, keepdim=True))

def make():
    torch.manual_seed(0)
    return Tiny().eval()
"""
IDS = torch.ones(2, 7, dtype=torch.int64)
FREE = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @override
    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.fixture
def made(tmp_path: Path) -> torch.nn.Module:
    (tmp_path / "tiny_model.py").write_text(MODEL)
    return load_factory(f"{tmp_path}/tiny_model.py:make")


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "executed"


def saved_pt2(module: torch.nn.Module, path: Path, shapes: Any = FREE) -> Path:
    with quiet():
        torch.export.save(torch.export.export(module, (IDS,), dynamic_shapes=(shapes,)), path)
    return path


def saved_script(module: torch.nn.Module, path: Path) -> Path:
    with quiet():
        torch.jit.trace(module, (IDS,)).save(str(path))  # type: ignore[no-untyped-call]
    return path


def refused(path: Path, mark: Path, **options: Any) -> str:
    with pytest.raises(PickleRefusedError) as caught:
        open_source(path, SourceOptions(**options))
    assert not mark.exists()
    assert "--trust-pickle" in str(caught.value)
    return caught.value.reason


def rewritten(path: Path, change: Callable[[str, bytes], bytes | None], **added: bytes) -> Path:
    """Write the archive again with its parts changed, some taken away and others added."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(parts)).split("/")[0]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in parts.items():
            if (new := change(name, content)) is not None:
                archive.writestr(name, new)
        for name, content in added.items():
            archive.writestr(f"{root}/{name}", content)
    return path


def pickled(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_a_malicious_pickle_is_never_executed(suffix: str, tmp_path: Path, mark: Path) -> None:
    path = tmp_path / f"evil{suffix}"
    torch.save({"weight": Payload(mark)}, path)
    assert "needs" in refused(path, mark)
    torch.save({"weight": Payload(mark)}, path, _use_new_zipfile_serialization=False)
    assert "needs" in refused(path, mark)
    with pytest.raises(SourceError):
        open_source(path, SourceOptions(trust_pickle=True))
    assert mark.exists()  # the payload works


def test_an_exported_program_is_never_unpickled(
    made: torch.nn.Module, tmp_path: Path, mark: Path
) -> None:
    path = saved_pt2(made, tmp_path / "model.pt2")
    whole = path.read_bytes()

    def samples(name: str, content: bytes) -> bytes:
        return pickled(Payload(mark)) if "sample_inputs" in name else content

    def weights(name: str, content: bytes) -> bytes:
        if name.endswith("/weight_0"):
            return pickled(Payload(mark))
        if not name.endswith("weights_config.json"):
            return content
        config = json.loads(content)
        for entry in config["config"].values():
            entry["use_pickle"] = True
        return json.dumps(config).encode()

    assert "sample_inputs" in refused(rewritten(path, samples), mark)
    path.write_bytes(whole)
    assert "pickled" in refused(rewritten(path, weights), mark)
    path.write_bytes(whole)
    library = {"data/aotinductor/model/model.so": b"\x7fELF"}
    assert "compiled" in refused(rewritten(path, lambda _, c: c, **library), mark)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("torch.ops.aten.linear.default", "torch.os.system", "calls torch.os.system"),
        ("torch.ops.aten.linear.default", "torch.ops.aten.from_file.default", "from_file"),
        ("torch.ops.aten.linear.default", "torchx.os.system", "calls torchx.os.system"),
        ("torch.ops.aten.linear.default", "_operator.methodcaller", "methodcaller"),
        ('"name": "ids"', '"name": "ids=print(1)"', "ids=print"),
        ("builtins.tuple", "collections.defaultdict", "defaultdict"),
    ],
)
def test_a_program_may_call_nothing_but_operators(  # noqa: PLR0913, PLR0917 - rows and fixtures
    made: torch.nn.Module, tmp_path: Path, mark: Path, old: str, new: str, reason: str
) -> None:
    path = saved_pt2(made, tmp_path / "model.pt2")

    def change(name: str, content: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return content
        assert old.encode() in content
        return content.replace(old.encode(), new.encode())

    assert reason in refused(rewritten(path, change), mark)


def test_a_program_evaluates_no_python_for_its_dimensions(
    made: torch.nn.Module, tmp_path: Path, mark: Path
) -> None:
    path = saved_pt2(made, tmp_path / "model.pt2")

    def change(name: str, content: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return content
        program = json.loads(content)
        spoil(program)
        return json.dumps(program).encode()

    def spoil(node: Any) -> None:
        if isinstance(node, dict) and "expr_str" in node:
            node["expr_str"] = f"__import__('pathlib').Path({str(mark)!r}).touch()"
        for part in node.values() if isinstance(node, dict) else node:
            if isinstance(part, dict | list):
                spoil(part)

    assert "evaluates" in refused(rewritten(path, change), mark)


@pytest.mark.parametrize(
    ("text", "fine"),
    [
        ("Mul(Integer(8), Symbol('s75', positive=True, integer=True))", True),
        ("Max(1, -2*s3 + 4)", True),
        ("Float('1.5', precision=53)", True),
        ("x.y", False),
        ("open('f')", False),
        ("Symbol('a(b)')", False),
        ("lambdify", False),
        ("[s0 for s0 in s1]", False),
        ("Mul(", False),
    ],
)
def test_only_arithmetic_on_symbols_is_harmless(text: str, fine: bool) -> None:
    assert harmless(text) is fine


def test_a_script_may_not_touch_files(tmp_path: Path, mark: Path) -> None:
    path = tmp_path / "evil.pt"
    source = f"def forward(self, x: Tensor) -> Tensor:\n  torch.save(x, '{mark}')\n  return x\n"
    with quiet():
        module = torch.jit.ScriptModule()
        module.define(source)
        module.save(str(path))
    assert "files" in refused(path, mark)


def test_every_form_gives_the_model_it_was_saved_from(
    made: torch.nn.Module, tmp_path: Path
) -> None:
    forms: dict[str, dict[str, Any]] = {
        "model.pt2": {},
        "script.pt": {},
        "weights.bin": {"model": f"{tmp_path}/tiny_model.py:make"},
        "nested.pth": {"model": f"{tmp_path}/tiny_model.py:make"},
        "whole.pt": {"trust_pickle": True},
    }
    saved_pt2(made, tmp_path / "model.pt2")
    saved_script(made, tmp_path / "script.pt")
    torch.save(made.state_dict(), tmp_path / "weights.bin")
    torch.save({"state_dict": made.state_dict(), "step": 3}, tmp_path / "nested.pth")
    torch.save(made, tmp_path / "whole.pt")
    ids = np.arange(6).reshape(2, 3)
    with torch.no_grad():
        want = made(torch.from_numpy(ids)).numpy()
    for name, options in forms.items():
        source = open_source(tmp_path / name, SourceOptions(**options))
        assert source.name == Path(name).stem
        assert [p.name for p in source.program.signature.inputs] == ["ids"]
        assert source.program.signature.outputs[0].shape == ("B", "S", 5)
        assert len(source.program.facts.source.digest) == 64
        (found,) = source.reference.run([{"ids": ids}])
        np.testing.assert_allclose(found["last_hidden_state"], want, rtol=1e-6)


def test_a_state_dict_says_what_it_needs_and_must_fit(
    made: torch.nn.Module, tmp_path: Path
) -> None:
    path, model = tmp_path / "weights.pt", f"{tmp_path}/tiny_model.py:make"
    torch.save(made.state_dict(), path)
    with pytest.raises(UsageError, match=r"--model FILE\.py:factory"):
        open_source(path, SourceOptions())
    fewer = {k: v for k, v in made.state_dict().items() if k != "out.bias"}
    torch.save({**fewer, "extra": torch.ones(1)}, path)
    with pytest.raises(SourceError, match=r"1 missing \(out.bias\) and 1 unexpected \(extra\)"):
        open_source(path, SourceOptions(model=model))
    torch.save({**made.state_dict(), "out.bias": torch.ones(3)}, path)
    with pytest.raises(SourceError, match=r"size mismatch for out\.bias"):
        open_source(path, SourceOptions(model=model))
    torch.save([1, 2], path)
    with pytest.raises(SourceError, match="a list without named tensors"):
        open_source(path, SourceOptions())


def test_a_pickled_module_of_an_unknown_class_says_where_to_name_it(
    made: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    torch.save(made, tmp_path / "whole.pt")
    monkeypatch.delitem(sys.modules, "tiny_model")
    with pytest.raises(SourceError, match=r"--model FILE\.py:factory"):
        open_source(tmp_path / "whole.pt", SourceOptions(trust_pickle=True))


@pytest.mark.parametrize("name", ["model.pt2", "script.pt", "weights.pt"])
def test_a_damaged_file_is_one_line(made: torch.nn.Module, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "weights.pt":
        torch.save(made.state_dict(), path)
    else:
        (saved_pt2 if name.endswith("2") else saved_script)(made, path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not torch at all", whole[:4] + bytes(200)):
        path.write_bytes(content)
        with pytest.raises(SourceError) as caught:
            open_source(path, SourceOptions())
        assert "\n" not in str(caught.value)


def test_parts_that_are_missing_or_unreadable_are_damage(
    made: torch.nn.Module, tmp_path: Path
) -> None:
    path = saved_pt2(made, tmp_path / "model.pt2")
    rewritten(path, lambda name, content: None if name.endswith("weight_1") else content)
    with pytest.raises(SourceError, match="not a readable exported program"):
        open_source(path, SourceOptions())
    script = saved_script(made, tmp_path / "script.pt")
    rewritten(script, lambda name, content: b"?" if name.endswith("data.pkl") else content)
    with pytest.raises(SourceError, match="damaged, "):
        open_source(script, SourceOptions())


def test_fixed_shapes_are_refused(made: torch.nn.Module, tmp_path: Path) -> None:
    path = saved_pt2(made, tmp_path / "model.pt2", None)
    with pytest.raises(UnsupportedModelError, match="'ids' is fixed at"):
        open_source(path, SourceOptions())
