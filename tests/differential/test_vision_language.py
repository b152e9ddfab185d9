"""Models that see images and write text compute what transformers computes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support.schemes import scheme_of
from support.seeded import Seeded, wrong_scale
from support.tiny_vision_language import (
    BOS,
    CLASSES,
    IMAGE,
    LENGTH,
    NESTED,
    PAD,
    SIZE,
    TEXT,
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
from llmopt.errors import SourceError, UnsupportedModelError, UsageError
from llmopt.frontend.base import SourceOptions
from llmopt.frontend.huggingface.vision_language import open_vision_language
from llmopt.frontend.source import open_source
from llmopt.ir import graph as g
from llmopt.passes.pipeline import Pipeline
from llmopt.runtime.__main__ import main
from llmopt.runtime.npz import read_images
from llmopt.runtime.selftest import selftest
from llmopt.verification.bisection import bisect

pytestmark = pytest.mark.xdist_group("vision-language")  # each compiled once
REL = 1e-4  # float32, max|a-b| / max|b| over unpadded positions
SHOWN = [IMAGE] * LENGTH
ROWS = [
    [BOS, 5, 9, *SHOWN, 30, 77, 12],
    [BOS, *SHOWN, 8, 41, *SHOWN, 60, 7, 88],
    [23, 4, 5, 61, *SHOWN, 16],
]
IMAGES = 4  # in all of them
ENDLESS = 1000  # no token: what ends a row is then its length alone


def pictures(count: int = IMAGES) -> np.ndarray[Any, Any]:
    return np.random.default_rng(4).standard_normal((count, 3, SIZE, SIZE)).astype(np.float32)


def padded(rows: list[list[int]]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return rows of one length, padded in front, and their mask."""
    longest = max(map(len, rows))
    ids = [[PAD] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return np.array(ids), np.array(mask)


def close(found: Any, wanted: Any) -> bool:
    return bool(np.max(np.abs(found - wanted)) <= REL * np.max(np.abs(wanted)))


class Compiled:
    """A tiny checkpoint, traced once, and what was compiled of it."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.source = tiny_folder(folder / kind, kind)
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

    def pixels(self) -> torch.Tensor:
        """Return the images of ``ROWS`` as transformers takes them."""
        images = torch.tensor(pictures())
        if self.kind not in NESTED:
            return images
        none = torch.zeros_like(images[0])  # black: there is none
        first, second, third, fourth = images
        rows = [[first, none], [second, third], [fourth, none]]
        return torch.stack([torch.stack(row) for row in rows])

    def inputs(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        """Return what transformers takes for rows."""
        ids, mask = padded(rows)
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
        arrays = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return {name: torch.tensor(array) for name, array in arrays.items()}


pytestmark = pytest.mark.xdist_group("vision-language")  # compiled once
_SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("llava-siglip", "smolvlm")]

_MADE: dict[str, Compiled] = {}


@pytest.fixture(params=["llava", *_SLOW])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    if request.param not in _MADE:  # each once, in whichever order tests come
        _MADE[request.param] = Compiled(request.param, tmp_path_factory.mktemp("source"))
    return _MADE[request.param]


def test_three_components_every_attention_fused_and_the_cache_in_place(compiled: Compiled) -> None:
    fused = compiled.optimized.fusion
    for kind in ("attention", "norm", "rotary"):
        assert fused[kind].fused == fused[kind].expected, fused[kind]
    manifest = Manifest.read(compiled.artifact("onnxruntime-cpu"))
    assert [each.name for each in manifest.components] == ["vision", "embedding"]
    assert manifest.model.cache == "shared"
    assert (manifest.model.image_token, manifest.model.image_length) == (IMAGE, LENGTH)
    assert not (compiled.artifact("onnxruntime-cpu") / "genai_config.json").exists()


def test_features_of_images_are_those_of_transformers(compiled: Compiled) -> None:
    runner: Any = load(compiled.artifact("onnxruntime-cpu"))
    with torch.no_grad():
        wanted = compiled.model.get_image_features(compiled.pixels()).pooler_output
    features = runner.session.features(pictures())
    assert features.shape == (IMAGES, LENGTH, 48)
    assert close(features.reshape(-1, 48), torch.cat(list(wanted)).reshape(-1, 48).numpy())


@pytest.mark.parametrize(
    "target", ["onnxruntime-cpu", pytest.param("reference", marks=pytest.mark.slow)]
)
def test_logits_of_a_prompt_and_of_steps_are_those_of_transformers(
    compiled: Compiled, target: str
) -> None:
    """Three rows, padded in front; an image or two, with text before and after."""
    ids, mask = padded(ROWS)
    more = np.random.default_rng(1).integers(3, 90, (len(ids), 6))
    written = np.concatenate([ids, more], axis=1)
    real = np.concatenate([mask, np.ones_like(more)], axis=1)
    rows = [[*row, *map(int, each)] for row, each in zip(ROWS, more, strict=True)]
    with torch.no_grad():
        found = compiled.model(**compiled.inputs(rows), pixel_values=compiled.pixels())

    logits = load(compiled.artifact(target)).logits(
        written, prefill=ids.shape[1], mask=real, images=pictures()
    )

    prompt = real[:, : ids.shape[1]] == 1
    wanted = found.logits.numpy()
    assert close(logits[:, : ids.shape[1]][prompt], wanted[:, : ids.shape[1]][prompt])
    assert close(logits[:, ids.shape[1] :], wanted[:, ids.shape[1] :])


@pytest.mark.parametrize(
    "target", ["onnxruntime-cpu", pytest.param("reference", marks=pytest.mark.slow)]
)
def test_thirty_two_tokens_are_those_of_transformers(compiled: Compiled, target: str) -> None:
    given = compiled.inputs(ROWS)
    del given["position_ids"]  # `generate` makes its own
    options = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": ENDLESS}
    with torch.no_grad():
        rows = compiled.model.generate(**given, pixel_values=compiled.pixels(), **options)
    wanted = rows[:, given["input_ids"].shape[1] :].tolist()

    found = load(compiled.artifact(target)).generate_ids(
        ROWS, images=pictures(), max_new_tokens=32, stop_tokens=()
    )

    assert found == wanted
    assert len({token for row in wanted for token in row}) > 5  # not the same one again and again


def test_an_image_moves_what_is_written_and_may_be_left_out(compiled: Compiled) -> None:
    runner = load(compiled.artifact("onnxruntime-cpu"))
    options: Any = {"max_new_tokens": 12, "stop_tokens": ()}
    seen = runner.generate_ids(ROWS[0], images=pictures(1), **options)
    other = runner.generate_ids(ROWS[0], images=-pictures(1), **options)
    assert seen != other
    text = [BOS, 5, 9, 30]
    with torch.no_grad():
        ended = {"do_sample": False, "eos_token_id": ENDLESS, "max_new_tokens": 12}
        ids = torch.tensor([text])
        rows = compiled.model.generate(ids, attention_mask=torch.ones_like(ids), **ended)
    assert runner.generate_ids(text, **options) == rows[0, len(text) :].tolist()


def test_an_image_token_that_is_written_stands_for_no_image(compiled: Compiled) -> None:
    row = [*ROWS[0], IMAGE, 5]
    given = compiled.inputs([ROWS[0]])
    with torch.no_grad():
        begun = compiled.model(**given, pixel_values=compiled.pixels()[:1], use_cache=True)
        rest = torch.tensor([row[len(ROWS[0]) :]])
        wanted = compiled.model(input_ids=rest, past_key_values=begun.past_key_values).logits

    logits = load(compiled.artifact("onnxruntime-cpu")).logits(
        [row], prefill=len(ROWS[0]), images=pictures()[:1]
    )

    assert close(logits[:, len(ROWS[0]) :], wanted.numpy())


def test_one_token_may_stand_for_an_image(compiled: Compiled) -> None:
    runner = load(compiled.artifact("onnxruntime-cpu"))
    short = [BOS, 5, 9, IMAGE, 30, 77, 12]
    options: Any = {"images": pictures(1), "max_new_tokens": 8, "stop_tokens": ()}
    assert runner.generate_ids(short, **options) == runner.generate_ids(ROWS[0], **options)
    one, two = (runner.generate(p, images=pictures(1)) for p in ("w5 <image> w9", "w5 <image> w8"))
    together = runner.generate(["w5 <image> w9", "w5 <image> w8"], images=pictures(1).repeat(2, 0))
    assert together == [one, two]
    assert "".join(runner.stream("w5 <image> w9", images=pictures(1))) == one


def test_arrays_go_through_all_three_models(compiled: Compiled) -> None:
    runner = load(compiled.artifact("onnxruntime-cpu"))
    ids = np.array([ROWS[0]])
    found = runner.run({"input_ids": ids, "pixel_values": pictures(1)})
    wanted = runner.logits(ids, images=pictures(1))
    assert close(found["logits"], wanted[:, -1:])
    without = runner.run({"input_ids": np.array([[BOS, 5, 9]])})
    assert close(without["logits"], runner.logits([[BOS, 5, 9]])[:, -1:])


@pytest.mark.parametrize(
    ("target", "scheme"),
    [
        ("onnxruntime-cpu", None),
        pytest.param("reference", None, marks=pytest.mark.slow),
        pytest.param("onnxruntime-arm64", None, marks=pytest.mark.slow),
        pytest.param("onnxruntime-cpu", "w8", marks=pytest.mark.slow),
        pytest.param("onnxruntime-cpu", "w4{head=8}", marks=pytest.mark.slow),
    ],
)
def test_an_artifact_is_proven_and_tests_itself(
    compiled: Compiled, target: str, scheme: str | None
) -> None:
    artifact = compiled.artifact(target, scheme)
    verification = Manifest.read(artifact).verification
    assert verification["status"] == "passed"
    assert verification["cases"] >= 9
    tested = selftest(artifact)
    assert tested.passed, str(tested)
    assert {check.name for check in tested.checks} >= {"files", "tokenizer", "logits"}


def test_the_command_line_sees_images(
    compiled: Compiled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = compiled.artifact("onnxruntime-cpu")
    np.savez(tmp_path / "in.npz", pixel_values=pictures(1), input_ids=np.array([[5]]))
    wanted = load(artifact).generate("w5 <image> w9", images=pictures(1), max_new_tokens=5)
    line = [str(artifact), "--prompt", "w5 <image> w9", "--max-new-tokens", "5"]
    images = ["--images", str(tmp_path / "in.npz")]

    result = CliRunner().invoke(app, ["run", *line, *images])

    assert result.output == f"{wanted}\n"
    assert main([*line, *images]) == 0
    assert capsys.readouterr().out == f"{wanted}\n"
    shown = CliRunner().invoke(app, ["inspect", str(artifact)]).output
    assert "vision (vision.onnx)" in shown
    without = CliRunner().invoke(app, ["run", *line])
    assert without.exit_code == 2
    assert "images is empty" in without.output
    np.savez(tmp_path / "other.npz", first=pictures(1), second=pictures(1))
    with pytest.raises(SourceError, match="holds first, second, and no pixel_values"):
        read_images(tmp_path / "other.npz")


def test_what_cannot_be_is_refused(compiled: Compiled) -> None:
    runner = load(compiled.artifact("onnxruntime-cpu"))
    with pytest.raises(UsageError, match=r"images should be \[I, 3, 12, 12\], not \[1, 3, 12, 7\]"):
        runner.generate_ids(ROWS[0], images=pictures(1)[..., :7])
    with pytest.raises(UsageError, match="2 images, but 4 image tokens"):
        runner.generate_ids(ROWS[0], images=pictures(2))
    with pytest.raises(UsageError, match="4 image tokens, but images is empty; pass images="):
        runner.generate_ids(ROWS[0])
    with pytest.raises(UsageError, match="an image has one token here; write 4 for each"):
        runner.logits([[5, IMAGE, 6]], images=pictures(1))
    with pytest.raises(UsageError, match="is not one of the model's"):
        runner.generate_ids([VOCABULARY])
    for target in ("tvm-cpu", "tensorrt-rtx{sm=89}"):
        with pytest.raises(UnsupportedModelError, match=r"3 \(vision, embedding, decoder\)"):
            Compilation.prepare(compiled.optimized, find_backend(target), CompileOptions(), Clock())


@pytest.mark.slow
@pytest.mark.parametrize("component", ["vision", "decoder"])
@pytest.mark.parametrize("compiled", ["llava"], indirect=True)
def test_bisect_names_the_component(compiled: Compiled, component: str) -> None:
    source = compiled.optimized.source
    program = source.program.clone()
    part = next(each for each in program.parts() if each.main == component)
    node = str(g.nodes(part.graph, "Attention")[-1].name)

    found = bisect(
        dataclasses.replace(source, program=program),
        Pipeline((Seeded("Attention", wrong_scale, node),)),
    )

    assert found.culprit is not None
    assert (found.culprit.component, found.culprit.rewrite.node) == (component, node)


def test_parts_that_are_not_the_whole_are_refused(tmp_path: Path) -> None:
    """A tower is read at the layer that its module was made to read, not at the config's."""
    from llmopt.frontend.huggingface.loading import Loaded

    model = tiny_model("llava")
    wrong = type(model).forward

    def other_layer(*args: Any, **options: Any) -> Any:
        return wrong(model, *args, **options, vision_feature_layer=-1)

    model.forward = other_layer
    with pytest.raises(UnsupportedModelError, match="its logits differ from those of a decoder"):
        open_vision_language(Loaded(tmp_path, model, model.config.to_dict(), {}), SourceOptions())


@pytest.mark.slow
def test_what_is_put_together_in_another_way_is_refused(tmp_path: Path) -> None:
    for text, problem in {
        "gemma2": "'gemma2' scales the embeddings of tokens",
        "starcoder2": "'starcoder2' has no definition in llmopt",
    }.items():
        tiny_folder(tmp_path / text, "llava", text_config={**TEXT, "model_type": text})
        with pytest.raises(UnsupportedModelError, match=problem):
            open_source(tmp_path / text, SourceOptions())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llava", "idefics3"])
def test_every_pass_leaves_what_is_computed(kind: str, tmp_path: Path) -> None:
    options = CompileOptions(verify="each")
    source = tiny_folder(tmp_path / kind, kind)
    found = optimize(str(source), options, SourceOptions(), Clock())
    artifact = Compilation.prepare(found, find_backend("onnxruntime-cpu"), options, Clock()).run(
        tmp_path / "artifact"
    )
    assert artifact.checks
    assert not any(check.wrong for check in artifact.checks)
    assert dataclasses.asdict(artifact.manifest.model)["family"] == kind
