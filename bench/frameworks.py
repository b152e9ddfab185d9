"""More sides of ``vs_peers.py``: torch eager and compiled, CTranslate2, Optimum and Olive.

As in ``peers.py``: a builder makes what its tool runs, a runner answers ``prefill_and_decode`` or
``encode``, and each tool is imported where its runner starts.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from peers import Seconds, Tokens, checked

_LONGEST: Final = 1024  # tokens that a static cache holds

# --- building -----------------------------------------------------------------------------------


def build_ctranslate2(quantization: str) -> Callable[[Path, Path], None]:
    """Return what converts with CTranslate2's own converter.

    Args:
        quantization: ``"int8"``, weights in 8 bits and activations rounded as they come, or
            ``"float32"``.
    """

    def build(source: Path, place: Path) -> None:
        from ctranslate2.converters import TransformersConverter

        TransformersConverter(str(source)).convert(str(place), quantization=quantization)

    return build


def build_optimum(task: str) -> Callable[[Path, Path], None]:
    """Return what exports with Optimum; an encoder's graph is optimized by ONNX Runtime's tool."""

    def build(source: Path, place: Path) -> None:
        command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "onnx"]
        command += ["-m", str(source), "--task", task]
        command += ["--optimize", "O2"] if task == "feature-extraction" else []
        checked([*command, str(place)])

    return build


def build_olive(source: Path, place: Path) -> None:
    """Let Olive make a model of four bits; what it does by default asks a hub for calibration."""
    command = [sys.executable, "-m", "olive", "capture-onnx-graph", "-m", str(source)]
    command += ["-o", str(place), "--use_model_builder", "--precision", "int4", "--use_ort_genai"]
    checked(command, place.parent)  # it leaves a cache where it runs
    (model,) = place.rglob("genai_config.json")
    for file in list(model.parent.iterdir()):
        file.replace(place / file.name)


# --- running ------------------------------------------------------------------------------------


class TorchDecoder:
    """The module itself, eager, in float32: its own cache, logits of the last token."""

    def __init__(self, place: Path, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
        self.call: Any = self.model

    def cache(self) -> Any:
        """Return an empty cache."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def prefill_and_decode(self, prompt: Tokens, decode: int) -> Seconds:
        """Return seconds until the first token, and for each after it."""
        cache = self.cache()
        with self.torch.inference_mode():
            start = time.perf_counter()
            token = self._step(prompt[None], 0, cache)
            first = time.perf_counter()
            for number in range(decode):
                token = self._step(token, len(prompt) + number, cache)
            return first - start, (time.perf_counter() - first) / decode

    def _step(self, tokens: Tokens, before: int, cache: Any) -> Tokens:
        places = np.arange(before, before + tokens.shape[1])[None]
        found = self.call(
            input_ids=self.torch.from_numpy(tokens),
            position_ids=self.torch.from_numpy(places),
            past_key_values=cache,
            logits_to_keep=1,
        )
        return np.asarray(found.logits[:, -1].argmax(-1, keepdim=True).numpy())


class TorchCompiledDecoder(TorchDecoder):
    """The same through ``torch.compile``, with a cache of one size, as it asks for."""

    def __init__(self, place: Path, threads: int) -> None:
        super().__init__(place, threads)
        self.call = self.torch.compile(self.model, dynamic=False)

    def cache(self) -> Any:
        """Return an empty cache of one size."""
        from transformers import StaticCache

        return StaticCache(config=self.model.config, max_cache_len=_LONGEST)


class TorchCompiled:
    """An encoder through ``torch.compile``, in float32."""

    def __init__(self, place: Path, threads: int) -> None:
        import torch
        from transformers import AutoModel

        torch.set_num_threads(threads)
        self.torch = torch
        model = AutoModel.from_pretrained(place, dtype=torch.float32).eval()
        self.call: Any = torch.compile(model, dynamic=False)

    def encode(self, tokens: Tokens) -> npt.NDArray[Any]:
        """Return hidden states [B, S, E]."""
        with self.torch.inference_mode():
            return np.asarray(self.call(self.torch.from_numpy(tokens))[0].numpy())


class CTranslate2Decoder:
    """CTranslate2's generator; a callback tells when each token was there."""

    def __init__(self, place: Path, threads: int) -> None:
        import ctranslate2

        self.vocabulary = json.loads((place / "vocabulary.json").read_text())
        self.generator = ctranslate2.Generator(str(place), device="cpu", intra_threads=threads)

    def prefill_and_decode(self, prompt: Tokens, decode: int) -> Seconds:
        """Return seconds until the first token, and for each after it."""
        times: list[float] = []

        def told(_: Any) -> bool:
            times.append(time.perf_counter())
            return False

        start = time.perf_counter()
        self.generator.generate_batch(
            [[self.vocabulary[token] for token in prompt]],
            max_length=decode + 1,
            min_length=decode + 1,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=told,
        )
        return times[0] - start, (times[-1] - times[0]) / (len(times) - 1)


class CTranslate2Encoder:
    """CTranslate2's encoder."""

    def __init__(self, place: Path, threads: int) -> None:
        import ctranslate2

        self.encoder = ctranslate2.Encoder(str(place), device="cpu", intra_threads=threads)

    def encode(self, tokens: Tokens) -> npt.NDArray[Any]:
        """Return hidden states [B, S, E]."""
        return np.array(self.encoder.forward_batch(tokens.tolist()).last_hidden_state)


class OptimumDecoder:
    """Optimum's runner of what it exported, on ONNX Runtime."""

    def __init__(self, place: Path, threads: int) -> None:
        import onnxruntime
        import torch
        from optimum.onnxruntime import ORTModelForCausalLM

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.torch = torch
        self.model = ORTModelForCausalLM.from_pretrained(place, session_options=options)

    def prefill_and_decode(self, prompt: Tokens, decode: int) -> Seconds:
        """Return seconds until the first token, and for each after it."""
        past = None
        tokens = self.torch.from_numpy(prompt[None])
        seen = len(prompt)
        start = first = time.perf_counter()
        for number in range(decode + 1):
            mask = self.torch.ones((1, seen), dtype=self.torch.int64)
            found = self.model(input_ids=tokens, attention_mask=mask, past_key_values=past)
            past = found.past_key_values
            tokens = found.logits[:, -1].argmax(-1, keepdim=True)
            seen += 1
            if number == 0:
                first = time.perf_counter()
        return first - start, (time.perf_counter() - first) / decode


class OptimumEncoder:
    """What Optimum exported and optimized, by plain ONNX Runtime."""

    def __init__(self, place: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(str(place / "model.onnx"), options)
        self.names = {port.name for port in self.session.get_inputs()}

    def encode(self, tokens: Tokens) -> npt.NDArray[Any]:
        """Return hidden states [B, S, E]."""
        feeds = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
        feeds["token_type_ids"] = np.zeros_like(tokens)
        given = {name: array for name, array in feeds.items() if name in self.names}
        return np.asarray(self.session.run(None, given)[0])
