"""Tiny random checkpoints of models that read one sequence and write another, with tokenizers.

Each is written by transformers itself, which is also what results are compared with.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

VOCABULARY: Final = 89
PAD, EOS, START = 0, 1, 3
_BART: Final[Mapping[str, Any]] = {
    "vocab_size": VOCABULARY,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 60,
    "decoder_ffn_dim": 68,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": EOS,
    "decoder_start_token_id": START,
    "forced_eos_token_id": None,
}
_T5: Final[Mapping[str, Any]] = {
    "vocab_size": VOCABULARY,
    "d_model": 40,
    "d_kv": 16,
    "d_ff": 56,
    "num_layers": 3,  # not fewer than the decoder's: transformers' own cache needs it
    "num_decoder_layers": 2,
    "num_heads": 3,
    "relative_attention_num_buckets": 12,
    "relative_attention_max_distance": 20,
    "layer_norm_epsilon": 1e-2,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "decoder_start_token_id": START,
}
_WHISPER: Final[Mapping[str, Any]] = {
    **{key: value for key, value in _BART.items() if key != "max_position_embeddings"},
    "num_mel_bins": 10,
    "max_source_positions": 15,
    "max_target_positions": 64,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
CONFIGS: Final[Mapping[str, Any]] = {
    "bart": lambda: transformers.BartConfig(**_BART),
    "mbart": lambda: transformers.MBartConfig(**_BART, scale_embedding=True),
    "marian": lambda: transformers.MarianConfig(
        **_BART, scale_embedding=True, activation_function="swish"
    ),
    "marian-apart": lambda: transformers.MarianConfig(
        **_BART, share_encoder_decoder_embeddings=False, decoder_vocab_size=VOCABULARY - 7
    ),
    "pegasus": lambda: transformers.PegasusConfig(**_BART),
    "t5": lambda: transformers.T5Config(**_T5),
    "t5-gated": lambda: transformers.T5Config(
        **_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False
    ),
    "whisper": lambda: transformers.WhisperConfig(**_WHISPER),
}
CLASSES: Final[Mapping[str, Any]] = {
    "bart": transformers.BartForConditionalGeneration,
    "mbart": transformers.MBartForConditionalGeneration,
    "marian": transformers.MarianMTModel,
    "marian-apart": transformers.MarianMTModel,
    "pegasus": transformers.PegasusForConditionalGeneration,
    "t5": transformers.T5ForConditionalGeneration,
    "t5-gated": transformers.T5ForConditionalGeneration,
    "whisper": transformers.WhisperForConditionalGeneration,
}


def tiny_model(kind: str, seed: int = 0) -> Any:
    """Return transformers' module of a family, its weights moved from where they begin."""
    torch.manual_seed(seed)
    model = CLASSES[kind](CONFIGS[kind]()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if kind.startswith("marian") and "embed_positions" in name:
                continue  # sines and cosines, which its checkpoints leave out
            parameter.add_(torch.randn_like(parameter) * _spread(name, parameter))
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_(std=0.3)
    return model


def _spread(name: str, parameter: torch.Tensor) -> float:
    if name.endswith("bias"):
        return 0.05  # large ones decide alone which token is likeliest
    if name.endswith((".q.weight", ".k.weight")):
        return 0.1  # T5 does not scale its scores: a softmax of large ones doubles every error
    return 0.2 if parameter.ndim == 1 else 0.3


def tiny_folder(folder: Path, kind: str, **generation: Any) -> Path:
    """Write a checkpoint with its tokenizer; ``generation`` goes into its defaults."""
    model = tiny_model(kind)
    model.generation_config.update(**generation)
    model.save_pretrained(folder)
    write_words(folder)
    return folder


def write_words(folder: Path) -> None:
    """Write a tokenizer whose word ``w7`` is token 7, and that ends a text with ``</s>``."""
    special = {"<pad>": PAD, "</s>": EOS, "<s>": 2, "<start>": START}
    words = special | {f"w{n}": n for n in range(len(special), VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, "w4"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", EOS)]
    )
    backend.add_special_tokens(list(special))
    backend.save(str(folder / "tokenizer.json"))
