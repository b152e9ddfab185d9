"""Both sides of ``vs_peers.py`` and ``vs_genai.py``: how a tool's model is built, and how run.

A builder makes what its tool runs from a Hugging Face folder; a runner answers
``prefill_and_decode`` for a decoder or ``encode`` for an encoder. Each tool is imported where its
runner starts, in a process of its own.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int64]
Seconds = tuple[float, float]
QUIET: Final = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}


class Decoder(Protocol):
    """A language model, opened."""

    def prefill_and_decode(self, prompt: Tokens, decode: int) -> Seconds:
        """Return seconds until the first token, and seconds for each of ``decode`` after it."""


class Encoder(Protocol):
    """A sentence encoder, opened."""

    def encode(self, tokens: Tokens) -> npt.NDArray[Any]:
        """Return hidden states [B, S, E] of tokens [B, S]."""


# --- building -----------------------------------------------------------------------------------


def build_llmopt(target: str, scheme: str) -> Callable[[Path, Path], None]:
    """Return what compiles a folder with llmopt; proofs are made elsewhere."""

    def build(source: Path, place: Path) -> None:
        command = [sys.executable, "-m", "llmopt", "compile", str(source), "--target", target]
        command += ["--verify", "off", "-o", str(place)]
        command += [] if scheme == "fp32" else ["--quantize", scheme]
        checked(command)

    return build


def build_genai(precision: str) -> Callable[[Path, Path], None]:
    """Return what builds with onnxruntime-genai's builder: logits of the last token, as ours.

    Args:
        precision: ``"int4"``, in blocks of 32 with int8 activations, or ``"fp32"``.
    """
    options = ["prune_lm_head=true"]
    options += ["int4_accuracy_level=4", "int4_block_size=32"] if precision == "int4" else []

    def build(source: Path, place: Path) -> None:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source)]
        command += ["-o", str(place), "-p", precision, "-e", "cpu", "-c", f"{place}.cache"]
        checked([*command, "--extra_options", *options])

    return build


def build_gguf(source: Path, place: Path) -> None:
    """Write a GGUF in 16 bits, then let llama.cpp quantize it to Q4_0 as its tool does."""
    import llama_cpp

    half = place.with_suffix(".f16")
    write_gguf(source, half)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    files = [str(path).encode() for path in (half, place)]
    if llama_cpp.llama_model_quantize(*files, ctypes.byref(settings)):
        raise RuntimeError(f"llama.cpp could not quantize {half}")
    half.unlink()


GGUF_NAMES: Final[Mapping[str, str]] = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(source: Path, place: Path) -> None:
    """Write a Llama folder as GGUF, float16, with no vocabulary: tokens go in as numbers."""
    import gguf
    import torch
    from safetensors import safe_open

    config = json.loads((source / "config.json").read_text())
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(place, "llama", use_temp_file=True)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(shared)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float(config.get("rope_theta") or 10000.0))
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    with safe_open(source / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - the file is no mapping
            tensor = file.get_tensor(name).to(torch.float32).numpy()
            if "q_proj" in name or "k_proj" in name:
                tensor = interleaved(tensor, heads if "q_proj" in name else shared)
            wide = tensor.ndim == 1
            writer.add_tensor(gguf_name(name), tensor if wide else tensor.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """Return what GGUF calls a tensor of a Llama.

    >>> gguf_name("model.layers.3.mlp.down_proj.weight")
    'blk.3.ffn_down.weight'
    """
    whole = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight"}
    whole["model.norm.weight"] = "output_norm.weight"
    if name in whole:
        return whole[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[rest.removesuffix('.weight')]}.weight"


def interleaved(weight: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Return q or k weights [H*D, E] with the two halves of each head's rotation interleaved."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def build_openvino(group: int) -> Callable[[Path, Path], None]:
    """Return what exports with optimum-intel: int4, asymmetric, as OpenVINO recommends."""

    def build(source: Path, place: Path) -> None:
        command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino"]
        command += ["-m", str(source), "--task", "text-generation-with-past"]
        command += ["--weight-format", "int4", "--group-size", str(group), "--ratio", "1.0"]
        checked([*command, str(place)])

    return build


def build_openvino_encoder(precision: str) -> Callable[[Path, Path], None]:
    """Return what converts an encoder with OpenVINO, and quantizes it with NNCF for ``int8``."""

    def build(source: Path, place: Path) -> None:
        import openvino
        import torch
        from transformers import AutoModel

        model = AutoModel.from_pretrained(source, dtype=torch.float32).eval()
        rng = np.random.default_rng(0)
        texts = [rng.integers(1000, model.config.vocab_size, (1, n)) for n in range(8, 128, 4)]
        feeds = [
            {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": 0 * ids}
            for ids in texts
        ]
        example = {name: torch.from_numpy(array) for name, array in feeds[0].items()}
        made = openvino.convert_model(model, example_input=example)
        if precision == "int8":
            import nncf

            kind = nncf.ModelType.TRANSFORMER
            made = nncf.quantize(made, nncf.Dataset(feeds), model_type=kind)
        openvino.save_model(made, place / "model.xml", compress_to_fp16=False)

    return build


def write_bert(sizes: Mapping[str, int], folder: Path) -> None:
    """Write a random BERT; other sizes are those of BERT-base."""
    import torch
    from transformers import AutoModel, BertConfig

    torch.manual_seed(0)
    config = BertConfig(**sizes)
    AutoModel.from_config(config).save_pretrained(folder)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # some converters want a tokenizer
    words = special + [f"w{number}" for number in range(config.vocab_size - len(special))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")


def checked(command: list[str], folder: Path | None = None) -> None:
    """Run a command, in a folder if one is given; end with what it said if it fails."""
    done = subprocess.run(command, check=False, cwd=folder, **QUIET)  # type: ignore[call-overload]
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


# --- running ------------------------------------------------------------------------------------


class Llmopt:
    """An artifact, by llmopt's runner."""

    def __init__(self, place: Path, threads: int) -> None:
        import llmopt

        self.runner = llmopt.load(place, threads=threads)

    def prefill_and_decode(self, prompt: Tokens, decode: int) -> Seconds:
        """Return seconds until the first token, and for each after it."""
        from llmopt.interface.stepping import Sequences

        sequences = Sequences(self.runner.session, 1, len(prompt) + decode + 1)
        start = time.perf_counter()
        token = np.argmax(sequences.extend(prompt[None])[:, -1], axis=-1)
        first = time.perf_counter()
        for _ in range(decode):
            token = np.argmax(sequences.extend(token[:, None])[:, -1], axis=-1)
        return first - start, (time.perf_counter() - first) / decode

    def encode(self, tokens: Tokens) -> npt.NDArray[Any]:
        """Return hidden states [B, S, E]."""
        feeds = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
        return np.asarray(self.runner.run(feeds)["last_hidden_state"])


class LlamaCpp:
    """llama.cpp, through its C interface: no sampling, logits of the last token."""

    def __init__(self, place: Path, threads: int) -> None:
        import llama_cpp

        self.api = llama_cpp
        self.llm = llama_cpp.Llama(
            str(place),
            n_ctx=1024,
            n_batch=512,
            n_ubatch=512,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        self.vocabulary = self.llm.n_vocab()

    def prefill_and_decode(self, prompt: Tokens, decode: int) -> Seconds:
        """Return seconds until the first token, and for each after it."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.llm.ctx), True)  # noqa: FBT003 - C
        start = time.perf_counter()
        token = self._step(prompt)
        first = time.perf_counter()
        for _ in range(decode):
            token = self._step(np.array([token]))
        return first - start, (time.perf_counter() - first) / decode

    def _step(self, tokens: Tokens) -> int:
        given = (self.api.llama_token * len(tokens))(*tokens.tolist())
        if self.api.llama_decode(self.llm.ctx, self.api.llama_batch_get_one(given, len(tokens))):
            raise RuntimeError("llama.cpp could not run a step")
        logits = self.api.llama_get_logits_ith(self.llm.ctx, -1)
        return int(np.argmax(np.ctypeslib.as_array(logits, shape=(self.vocabulary,))))


class OpenVino:
    """OpenVINO GenAI's pipeline, by its own measurements; every prompt is new to its cache."""

    def __init__(self, place: Path, threads: int) -> None:
        import openvino
        import openvino_genai

        self.tensor = openvino.Tensor
        self.genai = openvino_genai
        self.pipe = openvino_genai.LLMPipeline(str(place), "CPU", INFERENCE_NUM_THREADS=threads)

    def prefill_and_decode(self, prompt: Tokens, decode: int) -> Seconds:
        """Return seconds until the first token, and for each after it."""
        config = self.genai.GenerationConfig(max_new_tokens=decode + 1, ignore_eos=True)
        config.do_sample = False
        ids, mask = self.tensor(prompt[None]), self.tensor(np.ones((1, len(prompt)), np.int64))
        found = self.pipe.generate(self.genai.TokenizedInputs(ids, mask), config).perf_metrics
        return found.get_ttft().mean / 1e3, found.get_tpot().mean / 1e3


class Genai:
    """onnxruntime-genai on its own builder's model."""

    def __init__(self, place: Path, threads: int) -> None:
        import onnxruntime_genai

        file = place / "genai_config.json"
        config = json.loads(file.read_text())
        config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
        file.write_text(json.dumps(config))
        self.genai = onnxruntime_genai
        self.model = onnxruntime_genai.Model(str(place))

    def prefill_and_decode(self, prompt: Tokens, decode: int) -> Seconds:
        """Return seconds until the first token, and for each after it."""
        params = self.genai.GeneratorParams(self.model)
        length = len(prompt) + decode + 1
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = self.genai.Generator(self.model, params)
        start = time.perf_counter()
        generator.append_tokens(prompt.astype(np.int32))
        generator.generate_next_token()  # chooses the first token; the next calls run a step each
        first = time.perf_counter()
        for _ in range(decode):
            generator.generate_next_token()
        return first - start, (time.perf_counter() - first) / decode


class OpenVinoEncoder:
    """OpenVINO's runtime on an ONNX file or its own format."""

    precision: str = "f32"

    def __init__(self, place: Path, threads: int) -> None:
        import openvino

        hints = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": self.precision}
        hints |= {"PERFORMANCE_HINT": "LATENCY"}
        model = next(p for p in (place / "model.xml", place / "model.onnx") if p.exists())
        self.model = openvino.Core().compile_model(str(model), "CPU", hints)
        self.names = {next(iter(port.get_names())) for port in self.model.inputs}

    def encode(self, tokens: Tokens) -> npt.NDArray[Any]:
        """Return hidden states [B, S, E]."""
        feeds = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
        feeds["token_type_ids"] = np.zeros_like(tokens)
        found = self.model({name: array for name, array in feeds.items() if name in self.names})
        return np.asarray(found[0])


class OpenVinoHalf(OpenVinoEncoder):
    """The same in bfloat16, which the processor has to have."""

    precision = "bf16"


class Torch:
    """The module itself, eager, in float32."""

    def __init__(self, place: Path, threads: int) -> None:
        import torch
        from transformers import AutoModel

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = AutoModel.from_pretrained(place, dtype=torch.float32).eval()

    def encode(self, tokens: Tokens) -> npt.NDArray[Any]:
        """Return hidden states [B, S, E]."""
        with self.torch.inference_mode():
            return np.asarray(self.model(self.torch.from_numpy(tokens))[0].numpy())
