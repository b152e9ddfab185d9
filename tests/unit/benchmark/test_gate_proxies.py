"""Exact gates: counts of what an artifact has to do."""

from __future__ import annotations

from typing import Any

import pytest
from support.tiny_decoder import TEXT, tiny_decoder

from llmopt.artifact.manifest import FileRecord, Manifest
from llmopt.backends.onnxruntime import OnnxRuntimeCpu
from llmopt.benchmark.gate.budgets import Budget
from llmopt.benchmark.gate.proxies import ProxyChange, compare, limits, totals
from llmopt.compiler.activations import activation_bytes
from llmopt.compiler.proxies import count_work
from llmopt.passes.pipeline import Pipeline

WORK: dict[str, Any] = {
    "operators": {
        "": {"Cast": 1},
        "layers.0.norm": {"SkipNorm": 1},
        "layers.1.norm": {"SkipNorm": 1},
    },
    "products": {
        "token": {"macs": {"int8": 100}, "weight_bytes": 50},
        "kept": {"macs": {"float32": 10}, "weight_bytes": 40},
    },
    "lookup_bytes": 4,
    "other_bytes": 6,
    "attention_macs": 8,
    "cache_bytes": 16,
    "activation_bytes": 1000,
}


def manifest(**changes: Any) -> Manifest:
    work = WORK | changes.pop("work", {})
    facts: dict[str, Any] = {"work": work, "files": (FileRecord("m", 500, ""),)}
    facts["compiled"] = {"fusion": {"norm": {"expected": 2, "fused": 2}}}
    return Manifest(target="onnxruntime-cpu", entry="m", task="generate", **facts | changes)


def failed(candidate: Manifest, **allowed: float) -> dict[str, ProxyChange]:
    found = compare("a", manifest(), candidate, allowed)
    return {change.metric: change for change in found if change.failed}


def lowered(*without: str) -> Manifest:
    """The tiny decoder for ONNX Runtime, some lowering passes left out."""
    program = tiny_decoder(text=TEXT.replace("RMSNormalization (tokens", "RMSNormalization (sum"))
    for node in program.graph:
        node.name = f"layers.0.part/{node.name}"
    passes = OnnxRuntimeCpu().passes(None)
    Pipeline(tuple(each for each in passes if each.name not in without)).run(program)
    work = count_work(program).to_dict() | {"activation_bytes": activation_bytes(program)}
    return manifest(work=work)


def test_totals_are_of_one_token() -> None:
    assert totals(manifest()) == {
        "size_bytes": 500,
        "weight_bytes_per_token": 100,
        "flops_per_token": 220,
        "attention_flops_per_pair": 16,
        "cache_bytes_per_token": 16,
        "activation_bytes": 1000,
    }
    assert totals(Manifest(target="t", entry="m", task="raw")) == {"size_bytes": 0}


def test_the_same_artifact_fails_nothing() -> None:
    changes = compare("a", manifest(), manifest(), {})
    assert not any(change.failed for change in changes)
    assert {c.metric for c in changes} >= {"size_bytes", "operators", "fused norm"}


@pytest.mark.parametrize(
    "key", ["lookup_bytes", "attention_macs", "cache_bytes", "activation_bytes"]
)
def test_one_more_of_anything_is_a_regression(key: str) -> None:
    assert len(failed(manifest(work={key: WORK[key] + 1}))) == 1
    assert not failed(manifest(work={key: WORK[key] - 1}))


def test_what_may_grow_may() -> None:
    larger = manifest(files=(FileRecord("m", 510, ""),))
    assert set(failed(larger)) == {"size_bytes"}
    assert not failed(larger, size_bytes=0.02)


def test_a_fusion_that_is_gone_names_its_layer() -> None:
    work = {"operators": WORK["operators"] | {"layers.1.norm": {"Norm": 1}, "layers.1": {"Add": 1}}}
    found = failed(manifest(work=work))
    assert set(found) == {"operators", "operators layers.1"}
    assert found["operators layers.1"].detail == "Add 0 → 1; norm: SkipNorm 1 → 0, Norm 0 → 1"
    assert found["operators"].detail == "SkipNorm 2 → 1, Add 0 → 1, Norm 0 → 1"


def test_an_operator_that_moves_within_its_layer_is_no_regression() -> None:
    work = {
        "operators": {"": {"Cast": 1}, "layers.0": {"SkipNorm": 1}, "layers.1.x": {"SkipNorm": 1}}
    }
    assert not failed(manifest(work=work))


def test_one_layer_is_not_made_up_for_by_another() -> None:
    work = {
        "operators": {"layers.0.norm": {"SkipNorm": 1}, "layers.1.norm": {"SkipNorm": 1, "Add": 1}}
    }
    assert set(failed(manifest(work=work))) == {"operators layers.1"}


def test_what_was_fused_stays_fused() -> None:
    found = failed(manifest(compiled={"fusion": {"norm": {"expected": 2, "fused": 1}}}))
    assert set(found) == {"fused norm"}
    assert "fused norm" in failed(manifest(compiled={"fusion": {"attention": {"fused": 2}}}))


def test_artifacts_that_say_nothing_are_compared_by_size() -> None:
    silent = Manifest(target="t", entry="m", task="raw", files=(FileRecord("m", 501, ""),))
    assert set(failed(silent)) == {"size_bytes"}
    assert not any(change.failed for change in compare("a", silent, manifest(), {}))


def test_a_pass_left_out_is_caught_where_it_was() -> None:
    changes = compare("a", lowered(), lowered("fuse-skip-norm"), {})
    found = {c.metric: c.detail for c in changes if c.failed}
    assert set(found) == {"operators", "operators layers.0"}
    assert "SkipSimplifiedLayerNormalization 1 → 0" in found["operators layers.0"]
    assert not any(c.failed for c in compare("a", lowered("fuse-skip-norm"), lowered(), {}))


def test_activations_are_planned_from_shapes() -> None:
    work = lowered().work
    # One prompt of 64 tokens, the model's limit: the largest is [1, 64, 64] float32.
    assert work["activation_bytes"] >= 64 * 64 * 4
    assert work["activation_bytes"] == lowered().work["activation_bytes"]


def test_limits_are_of_the_candidate_itself() -> None:
    kept = manifest(quality={"kl_mean": 0.3, "top1": 0.8, "text": "none"})
    for budget, fails in (
        (Budget("*", "kl_mean", most=0.2), True),
        (Budget("*", "kl_mean", most=0.3), False),
        (Budget("*", "top1", least=0.9), True),
        (Budget("*", "top1", least=0.8), False),
        (Budget("*", "size_bytes", most=499), True),
        (Budget("*", "cosine_min", least=0.9), True),  # nobody measured it
    ):
        (change,) = limits("a", budget, manifest(), kept)
        assert change.failed is fails, budget


def test_quality_is_compared_with_the_baselines() -> None:
    before, after = (
        manifest(quality={"kl_mean": kl, "top1": top}) for kl, top in ((0.3, 0.8), (0.33, 0.7))
    )
    for budget, fails in (
        (Budget("*", "kl_mean", max_regression=0.05), True),
        (Budget("*", "kl_mean", max_regression=0.2), False),
        (Budget("*", "top1", max_regression=0.05), True),
        (Budget("*", "top1", max_regression=0.2), False),
    ):
        (change,) = limits("a", budget, before, after)
        assert change.failed is fails, budget
