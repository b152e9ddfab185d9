"""GGUF tensors decode as the gguf package decodes them; damaged files are refused."""

import struct
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from support.gguf_files import (
    FEED,
    GROUPS,
    HEAD_WIDTH,
    HEADS,
    HIDDEN,
    LAYERS,
    VOCABULARY,
    permute,
    sizes,
    smollm2,
    write,
)

from llmopt.errors import SourceError, UnsupportedModelError
from llmopt.frontend.gguf import checkpoint as reader
from llmopt.frontend.gguf.checkpoint import GgufCheckpoint, read_tensor
from llmopt.frontend.gguf.config import gguf_config, gguf_pooling
from llmopt.frontend.gguf.file import read_gguf
from llmopt.frontend.gguf.rope import llama3_divisors
from llmopt.frontend.huggingface.checkpoint import open_checkpoint

KINDS = [kind.name for kind in GGMLQuantizationType if kind in quants._type_traits]
ROWS, WIDTH = 12, 512


def random_blocks(kind: GGMLQuantizationType) -> np.ndarray:
    """Return [ROWS, bytes] of blocks: quantized noise, or random bits where it cannot quantize."""
    rng = np.random.default_rng(int(kind))
    try:
        noise = rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
        return np.asarray(quants.quantize(noise, kind)).view(np.uint8).reshape(ROWS, -1)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        return rng.integers(0, 60, (ROWS, WIDTH // block * size), dtype=np.uint8)


def minimal(tensors: dict[str, Any]) -> dict[str, Any]:
    """Return a Llama's tensors, all zero but those given."""
    zeros = {
        "token_embd.weight": np.zeros((VOCABULARY, HIDDEN), np.float32),
        "output_norm.weight": np.ones(HIDDEN, np.float32),
        "blk.0.attn_q.weight": np.zeros((HEADS * HEAD_WIDTH, HIDDEN), np.float32),
        "blk.0.attn_k.weight": np.zeros((GROUPS * HEAD_WIDTH, HIDDEN), np.float32),
    }
    return zeros | tensors


@pytest.mark.parametrize("kind", KINDS)
def test_every_quantized_type_decodes_as_the_gguf_package_does(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_CHUNK", 5 * WIDTH)  # pieces of 5, 5 and 2 rows
    number = GGMLQuantizationType[kind]
    blocks = random_blocks(number)
    tensors = minimal({"blk.0.ffn_up.weight": (blocks, number)})
    write(tmp_path / "m.gguf", "llama", sizes(), tensors)
    checkpoint = GgufCheckpoint(tmp_path / "m.gguf")
    name = "model.layers.0.mlp.up_proj.weight"
    read = checkpoint.read(name)
    expected = quants.dequantize(blocks, number)
    assert checkpoint.shape(name) == read.shape == (ROWS, WIDTH)
    if kind == "BF16":
        assert checkpoint.dtype(name) == "bfloat16"
        assert read.dtype == ml_dtypes.bfloat16
    else:
        assert checkpoint.dtype(name) == kind
        assert read.dtype == np.float32
    np.testing.assert_array_equal(read.astype(np.float32), expected)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int32, np.int8])
def test_plain_types_are_returned_as_stored(dtype: Any, tmp_path: Path) -> None:
    array = np.arange(ROWS * 8).reshape(ROWS, 8).astype(dtype)
    write(tmp_path / "m.gguf", "llama", sizes(), minimal({"blk.0.ffn_up.weight": array}))
    checkpoint = open_checkpoint(tmp_path)
    read = checkpoint.read("model.layers.0.mlp.up_proj.weight")
    assert checkpoint.dtype("model.layers.0.mlp.up_proj.weight") == np.dtype(dtype).name
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, array)


def test_quantized_q_and_k_are_put_back_in_order(tmp_path: Path) -> None:
    kind = GGMLQuantizationType.Q8_0
    arrays = {}
    for name, heads in (("attn_q", HEADS), ("attn_k", GROUPS)):
        rng = np.random.default_rng(heads)
        plain = rng.standard_normal((heads * HEAD_WIDTH, HIDDEN)).astype(np.float32)
        decoded = quants.dequantize(quants.quantize(plain, kind), kind)
        arrays[name] = decoded
    tensors = {
        f"blk.0.{name}.weight": (quants.quantize(permute(array, heads), kind), kind)
        for (name, array), heads in zip(arrays.items(), (HEADS, GROUPS), strict=True)
    }
    write(tmp_path / "m.gguf", "llama", sizes(), minimal(tensors))
    checkpoint = GgufCheckpoint(tmp_path / "m.gguf")
    for name, array in arrays.items():
        found = checkpoint.read(f"model.layers.0.self_attn.{name[-1]}_proj.weight")
        np.testing.assert_array_equal(found, array)


def test_a_type_that_the_package_cannot_decode_is_refused_on_reading(tmp_path: Path) -> None:
    kind = GGMLQuantizationType.Q8_1
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.zeros((ROWS, WIDTH // block * size), np.uint8)
    tensors = minimal({"blk.0.ffn_up.weight": (blocks, kind)})
    write(tmp_path / "m.gguf", "llama", sizes(), tensors)
    checkpoint = GgufCheckpoint(tmp_path / "m.gguf")
    with pytest.raises(SourceError, match="cannot decode type Q8_1"):
        checkpoint.read("model.layers.0.mlp.up_proj.weight")


def tiny(path: Path, **metadata: Any) -> Path:
    return write(path, "llama", sizes(**metadata), minimal({}))


def test_every_truncation_is_refused_at_open_with_byte_counts(tmp_path: Path) -> None:
    data = tiny(tmp_path / "m.gguf").read_bytes()
    # the writer pads the end of the file; the last tensor ends before that
    last = read_gguf(tmp_path / "m.gguf").tensors["blk.0.attn_k.weight"]
    end = max(last.offset + last.size_bytes, len(data) - 32)
    assert end > len(data) - 33
    for keep in [*range(4, 1500, 7), len(data) // 2, end - 1]:
        (tmp_path / "m.gguf").write_bytes(data[:keep])
        with pytest.raises(SourceError) as caught:
            open_checkpoint(tmp_path / "m.gguf")
        assert "truncated" in str(caught.value)
        assert str(keep) in str(caught.value)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "is empty"),
        (b"GGUX" + bytes(60), "unknown kind of weights file|does not start with GGUF"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(60), "version 1; versions 2 and 3 are supported"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(60), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0) + bytes(60), "appears twice|truncated"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 62), "truncated"),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 77),
            "value type 77",
        ),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 8, 1 << 60),
            "truncated",
        ),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 9, 1),
            "array of unsupported value type 9",
        ),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2) + b"\xff\xfe" + bytes(9), "not UTF-8"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, data: bytes, problem: str) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(SourceError, match=problem) as caught:
        read_gguf(tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)


def patched(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))


def info(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    head = struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(dims))
    return head + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("dims", "kind", "offset", "problem"),
    [
        ((HIDDEN,), 0, 0, "overlaps"),
        ((HIDDEN,), 99, VOCABULARY * HIDDEN * 4, "unknown ggml type 99"),
        ((1 << 40,), 0, VOCABULARY * HIDDEN * 4, "overlaps|truncated"),
        ((HIDDEN,), 12, VOCABULARY * HIDDEN * 4, "not a multiple of a Q4_K block"),
    ],
)
def test_a_damaged_tensor_table_is_refused(
    tmp_path: Path, dims: tuple[int, ...], kind: int, offset: int, problem: str
) -> None:
    path = tiny(tmp_path / "m.gguf")
    good = info("output_norm.weight", (HIDDEN,), 0, VOCABULARY * HIDDEN * 4)
    patched(path, good, info("output_norm.weight", dims, kind, offset))
    with pytest.raises(SourceError, match=problem):
        open_checkpoint(path)


def test_too_many_axes_and_repeated_names_are_refused(tmp_path: Path) -> None:
    path = tiny(tmp_path / "m.gguf")
    good = path.read_bytes()
    patched(path, b"output_norm.weight" + struct.pack("<I", 1), b"output_norm.weight\xff\0\0\0")
    with pytest.raises(SourceError, match="255 axes"):
        open_checkpoint(path)
    path.write_bytes(good)
    patched(path, b"blk.0.attn_k.weight", b"blk.0.attn_q.weight")
    with pytest.raises(SourceError, match=r"'blk.0.attn_q.weight' appears twice"):
        open_checkpoint(path)


def test_a_wrong_alignment_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "llama", {"tokenizer.x": 1}, minimal({}))
    patched(path, b"tokenizer.x", b"tokenizer.y")
    data = path.read_bytes().replace(
        struct.pack("<Q", 11) + b"tokenizer.y" + struct.pack("<II", 4, 1),
        struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", 4, 33),
    )
    path.write_bytes(data)
    with pytest.raises(SourceError, match="33, not a power of two"):
        open_checkpoint(path)


def test_one_part_of_a_split_checkpoint_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(SourceError, match="one of 3 parts of a split"):
        open_checkpoint(tmp_path / "m.gguf")


def test_a_file_cut_while_in_use_is_an_error(tmp_path: Path) -> None:
    path = tiny(tmp_path / "m.gguf")
    checkpoint = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(SourceError, match="it changed while it was read"):
        checkpoint.read("model.layers.0.self_attn.k_proj.weight")
    path.unlink()
    with pytest.raises(SourceError, match="cannot be read"):
        checkpoint.read("model.norm.weight")


def test_an_unknown_architecture_is_refused_with_those_known(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", "mamba", {"block_count": 2}, minimal({}))
    with pytest.raises(UnsupportedModelError, match=r"'mamba' \(known: llama, "):
        open_checkpoint(tmp_path / "m.gguf")


def test_a_tensor_without_a_place_is_refused_not_dropped(tmp_path: Path) -> None:
    experts = {f"blk.{i}.ffn_gate_inp.weight": np.zeros((4, 8), np.float32) for i in range(7)}
    write(tmp_path / "m.gguf", "llama", sizes(), minimal(experts))
    with pytest.raises(UnsupportedModelError, match="7 tensors are unknown in a 'llama' model"):
        open_checkpoint(tmp_path / "m.gguf")


def test_heads_that_do_not_divide_the_rows_are_refused(tmp_path: Path) -> None:
    path = tiny(tmp_path / "m.gguf", **{"attention.head_count": 5})
    with pytest.raises(SourceError, match="not 5 heads"):
        open_checkpoint(path).read("model.layers.0.self_attn.q_proj.weight")


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"attention.head_count_kv": [2, 4]}, "attention.head_count_kv differs from layer"),
        ({"attention.value_length": 8}, "values of width 8 with keys of width 16"),
        ({"rope.dimension_count": 4}, r"partial rotary embeddings \(4 of 16 channels\)"),
        ({"rope.scaling.type": "spiral"}, "rope scaling 'spiral'"),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 2.0,
                "rope.scaling.yarn_ext_factor": 0.5,
            },
            "yarn extrapolation",
        ),
    ],
)
def test_what_a_config_cannot_say_is_refused(
    tmp_path: Path, metadata: dict[str, Any], problem: str
) -> None:
    path = tiny(tmp_path / "m.gguf", **metadata)
    with pytest.raises(UnsupportedModelError, match=problem):
        gguf_config(read_gguf(path))


def test_missing_metadata_and_tensors_are_named(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", "llama", {"block_count": 2}, minimal({}))
    with pytest.raises(SourceError, match=r"lacks the number llama.attention.head_count"):
        gguf_config(read_gguf(tmp_path / "m.gguf"))
    write(tmp_path / "n.gguf", "llama", sizes(), {"output_norm.weight": np.ones(4, np.float32)})
    with pytest.raises(SourceError, match=r"lacks the tensor 'blk.0.attn_q.weight'"):
        gguf_config(read_gguf(tmp_path / "n.gguf"))


def test_numbers_given_layer_by_layer_are_taken_when_they_agree(tmp_path: Path) -> None:
    path = tiny(tmp_path / "m.gguf", **{"attention.head_count_kv": [GROUPS] * LAYERS})
    config = gguf_config(read_gguf(path))
    assert config["num_key_value_heads"] == GROUPS
    assert config["intermediate_size"] == FEED
    assert config["rms_norm_eps"] == 1e-5  # the shortest decimal, not float32's tail


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, None),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 2.0}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, None),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 1.0,
                "rope.scaling.attn_factor": 0.5,
            },
            {"rope_type": "yarn", "factor": 1.0, "attention_factor": 0.5},
        ),
    ],
)
def test_rope_scaling_is_read(tmp_path: Path, metadata: dict[str, Any], expected: Any) -> None:
    config = gguf_config(read_gguf(tiny(tmp_path / "m.gguf", **metadata)))
    assert config.get("rope_scaling") == expected


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recovered_from_its_table(
    tmp_path: Path, width: int, factor: float
) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    table = llama3_divisors(scaling, 500000.0 ** -(np.arange(width // 2) / (width // 2)))
    shape = {"attention.key_length": width, "attention.value_length": width}
    metadata = sizes(**shape) | {"rope.dimension_count": width, "rope.freq_base": 500000.0}
    tensors = minimal({"rope_freqs.weight": table.astype(np.float32)})
    tensors["blk.0.attn_q.weight"] = np.zeros((HEADS * width, HIDDEN), np.float32)
    path = write(tmp_path / "m.gguf", "llama", metadata, tensors)
    found = gguf_config(read_gguf(path))["rope_scaling"]
    assert found == pytest.approx(scaling, abs=2e-3)
    assert "rope_freqs.weight" not in open_checkpoint(path).names()


def test_a_rope_table_of_ones_is_plain_rotary_and_a_strange_one_is_refused(tmp_path: Path) -> None:
    ones = {"rope_freqs.weight": np.ones(HEAD_WIDTH // 2, np.float32)}
    path = write(tmp_path / "m.gguf", "llama", sizes(), minimal(ones))
    assert "rope_scaling" not in gguf_config(read_gguf(path))
    strange = {"rope_freqs.weight": np.array([1, 5, 2, 7, 1, 3, 8, 2], np.float32)}
    path = write(tmp_path / "m.gguf", "llama", sizes(), minimal(strange))
    with pytest.raises(UnsupportedModelError, match="does not follow Llama 3"):
        gguf_config(read_gguf(path))


def test_every_end_of_a_turn_ends_generation(tmp_path: Path) -> None:
    ends = {"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 7}
    config = gguf_config(read_gguf(tiny(tmp_path / "m.gguf", **ends)))
    assert config["eos_token_id"] == [2, 7]
    assert config["bos_token_id"] is None


@pytest.mark.parametrize(("layers", "scalar"), [(2, HEAD_WIDTH), (46, HIDDEN // HEADS)])
def test_the_large_gemma2_scales_attention_by_hidden_size(
    tmp_path: Path, layers: int, scalar: int
) -> None:
    metadata = sizes(block_count=layers, **{"attention.sliding_window": 4})
    path = write(tmp_path / "m.gguf", "gemma2", metadata, minimal({}))
    config = gguf_config(read_gguf(path))
    assert config["query_pre_attn_scalar"] == scalar
    assert config["layer_types"][:2] == ["sliding_attention", "full_attention"]


def test_gemma_takes_a_pattern_and_a_scale_from_the_file(tmp_path: Path) -> None:
    metadata = sizes(**{"attention.sliding_window": 4, "attention.scale": 0.25})
    metadata["attention.sliding_window_pattern"] = [False, True]
    path = write(tmp_path / "m.gguf", "gemma3", metadata, minimal({}))
    config = gguf_config(read_gguf(path))
    assert config["layer_types"] == ["full_attention", "sliding_attention"]
    assert config["query_pre_attn_scalar"] == 16.0


def test_pooling_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "bert", {"pooling_type": 2}, minimal({}))
    assert gguf_pooling(read_gguf(path)) == "cls"
    assert gguf_pooling(read_gguf(tiny(tmp_path / "n.gguf"))) is None


def test_a_scalar_tensor_has_one_element(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "llama", sizes(), minimal({"rope_freqs.weight": np.ones(1)}))
    assert read_tensor(read_gguf(path), "rope_freqs.weight").shape == (1,)


def test_smollm2_has_the_tensors_of_its_config() -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    checkpoint = GgufCheckpoint(smollm2())
    with torch.device("meta"):
        config = AutoConfig.for_model(**gguf_config(checkpoint.file))
        state = AutoModelForCausalLM.from_config(config).state_dict()
    assert {name: checkpoint.shape(name) for name in checkpoint.names()} == {
        name: tuple(value.shape) for name, value in state.items() if name != "lm_head.weight"
    }


@pytest.mark.slow
def test_smollm2_has_the_config_that_transformers_reads() -> None:
    from transformers import AutoConfig

    path = smollm2()
    theirs = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
    ours = AutoConfig.for_model(**gguf_config(read_gguf(path))).to_dict()
    # the file's title and unknown token, which no Llama config has
    theirs = {k: v for k, v in theirs.items() if k not in {"_model_name_or_path", "unk_token_id"}}
    for key in theirs.keys() - {"architectures", "_name_or_path", "dtype"}:
        # they keep float32's tail: 9.999999747378752e-06
        exact = not isinstance(theirs[key], float)
        assert ours.get(key) == (theirs[key] if exact else pytest.approx(theirs[key])), key


@pytest.mark.slow
def test_every_weight_of_smollm2_is_the_one_that_transformers_loads() -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    checkpoint = GgufCheckpoint(smollm2())
    with torch.device("meta"):
        config = AutoConfig.for_model(**gguf_config(checkpoint.file))
        model = AutoModelForCausalLM.from_config(config)
    loaded = load_gguf_checkpoint(smollm2(), return_tensors=True, model_to_load=model)["tensors"]
    assert set(checkpoint.names()) == set(loaded) - {"lm_head.weight"}
    for name in checkpoint.names():
        np.testing.assert_array_equal(checkpoint.read(name), loaded[name].numpy())
