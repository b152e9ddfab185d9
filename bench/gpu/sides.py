"""One side of the speed comparison in a process of its own; see ``suite.py``.

    python bench/gpu/sides.py SIDE SOURCE cuda|cpu

SIDE is one of torch's ways or an artifact; it prints tokens per second by workload as JSON. Every
token is brought to the processor before the next step, as a caller that streams it would.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import families
import peers
import shapes

TORCH: Final = ("torch eager", "torch.compile", "transformers generate")
PREFILLS, DECODE, ENCODE = (128, 512), 64, ((1, 128), (8, 128))
WARM, ROUNDS = 2, 5
TINY: Final = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
}


def write_llama(options: Mapping[str, Any], folder: Path) -> None:
    """Write a random Llama, which needs no tokenizer to be measured."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(**options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def write_bert(options: Mapping[str, Any], folder: Path) -> None:
    """Write a random BERT."""
    peers.write_bert(options, folder)


MODELS: Final[Mapping[str, Callable[[Path], None]]] = {
    "SmolLM2-135M": families.write_smollm2,
    "Llama 1.2 B shape": lambda folder: write_llama(shapes.LLAMA, folder),
    "MiniLM": families.write_minilm,
    "BERT-base shape": lambda folder: write_bert({}, folder),
}
REHEARSED: Final[Mapping[str, Callable[[Path], None]]] = {
    "tiny-llama": lambda folder: write_llama({**TINY, "num_key_value_heads": 2}, folder),
    "tiny-bert": lambda folder: write_bert(TINY, folder),
}


def write(name: str, folder: Path) -> None:
    """Write a checkpoint.

    Raises:
        FileNotFoundError: its weights are not installed.
    """
    ({**MODELS, **REHEARSED})[name](folder)


class TorchModel:
    """transformers' module, eager or compiled, in half precision on a GPU.

    Args:
        source: The checkpoint.
        kind: ``"cuda"`` or ``"cpu"``.
        compiled: Whether torch.compile takes the forward function, with a static cache.
    """

    def __init__(self, source: Path, kind: str, *, compiled: bool) -> None:
        import torch
        import transformers

        self.torch, self.transformers, self.kind = torch, transformers, kind
        config = transformers.AutoConfig.from_pretrained(source)
        self.decoder = "CausalLM" in (config.architectures or [""])[0]
        auto = transformers.AutoModelForCausalLM if self.decoder else transformers.AutoModel
        dtype = torch.float16 if kind == "cuda" else torch.float32
        self.model = auto.from_pretrained(source, dtype=dtype).to(kind).eval()
        self.compiled = compiled
        self.forward = torch.compile(self.model.forward) if compiled else self.model.forward

    def prefill_and_decode(self, prompt: np.ndarray, decode: int) -> tuple[float, float]:
        """Return seconds until the first token, and for each after it."""
        room = len(prompt) + decode + 1
        cache: Any = self.transformers.DynamicCache(config=self.model.config)
        if self.compiled:
            cache = self.transformers.StaticCache(config=self.model.config, max_cache_len=room)
        start = time.perf_counter()
        token = self._step(prompt, 0, cache)
        first = time.perf_counter()
        for index in range(decode):
            token = self._step(np.array([token]), len(prompt) + index, cache)
        return first - start, (time.perf_counter() - first) / decode

    def _step(self, tokens: np.ndarray, start: int, cache: Any) -> int:
        torch = self.torch
        places = torch.arange(start, start + len(tokens), device=self.kind)
        ids = torch.from_numpy(tokens).to(self.kind)[None]
        with torch.inference_mode():
            logits = self.forward(
                input_ids=ids, position_ids=places[None], past_key_values=cache, logits_to_keep=1
            ).logits
        return int(logits[0, -1].argmax())

    def encode(self, tokens: np.ndarray) -> np.ndarray:
        """Return hidden states [B, S, E]."""
        with self.torch.inference_mode():
            ids = self.torch.from_numpy(tokens).to(self.kind)
            states = self.forward(input_ids=ids, attention_mask=self.torch.ones_like(ids))[0]
        return np.asarray(states.float().cpu().numpy())


class Generate(TorchModel):
    """transformers' generate; the first token is timed by asking for one only."""

    def __init__(self, source: Path, kind: str) -> None:
        super().__init__(source, kind, compiled=False)

    def prefill_and_decode(self, prompt: np.ndarray, decode: int) -> tuple[float, float]:
        """Return seconds until the first token, and for each after it."""
        first, whole = self._seconds(prompt, 1), self._seconds(prompt, decode + 1)
        return first, (whole - first) / decode

    def _seconds(self, prompt: np.ndarray, count: int) -> float:
        ids = self.torch.from_numpy(prompt).to(self.kind)[None]
        start = time.perf_counter()
        made = self.model.generate(
            ids,
            attention_mask=self.torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        made.cpu()
        return time.perf_counter() - start


def opened(side: str, source: Path, kind: str) -> Any:
    """Return a side that is ready to run."""
    if side == "transformers generate":
        return Generate(source, kind)
    if side in TORCH:
        return TorchModel(source, kind, compiled=side == "torch.compile")
    return peers.Llmopt(Path(side), 1 if kind == "cuda" else 2)


def measured(side: str, source: Path, kind: str) -> dict[str, float]:
    """Return tokens per second by workload."""
    ready, config = opened(side, source, kind), json.loads((source / "config.json").read_text())
    rng, vocabulary = np.random.default_rng(0), config["vocab_size"]
    seconds: dict[str, list[float]] = {}
    if "CausalLM" in config["architectures"][0]:
        for _ in range(WARM + ROUNDS):
            for length in PREFILLS:
                first, each = ready.prefill_and_decode(rng.integers(10, vocabulary, length), DECODE)
                seconds.setdefault(f"prefill {length}", []).append(first / length)
                seconds.setdefault("decode", []).append(each)
    elif side != "transformers generate":
        for batch, length in ENCODE:
            for _ in range(WARM + 2 * ROUNDS):
                tokens = rng.integers(10, vocabulary, (batch, length))
                start = time.perf_counter()
                ready.encode(tokens)
                spent = (time.perf_counter() - start) / tokens.size
                seconds.setdefault(f"encode {batch} x {length}", []).append(spent)
    return {name: 1 / statistics.median(each[WARM:]) for name, each in seconds.items()}


if __name__ == "__main__":
    print(json.dumps(measured(sys.argv[1], Path(sys.argv[2]), sys.argv[3])))
