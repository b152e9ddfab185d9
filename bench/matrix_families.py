"""The families that llmopt is shown to take: a tiny random model of each, from its config.

Sizes are small and no two of B, S, P, H, G, D are equal, so that a mixed-up dimension shows: H 6,
G 2 where the family has groups, D 16 or 8, E 48, F 60, V 101, and at least two layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from families import DECODER, DECODERS, ENCODER, ENCODERS

GPT: Final[Mapping[str, Any]] = {"n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 64}
VISION: Final[Mapping[str, Any]] = {
    **{k: v for k, v in ENCODER.items() if k not in ("vocab_size", "max_position_embeddings")},
    "image_size": 20,
    "patch_size": 4,
    "num_channels": 3,
}
TEXT: Final[Mapping[str, Any]] = {
    **ENCODER,
    "pad_token_id": 1,
    "bos_token_id": 99,
    "eos_token_id": 100,  # CLIP pools at the first token of this number
    "projection_dim": 28,
}
MIXTURE: Final[Mapping[str, Any]] = {"num_experts_per_tok": 2, "moe_intermediate_size": 28}
ENCODER_DECODER: Final[Mapping[str, Any]] = {
    "vocab_size": 101,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 60,
    "decoder_ffn_dim": 60,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


@dataclass(frozen=True)
class Family:
    """One row of the matrix.

    Args:
        name: As transformers calls it.
        kind: ``"decoder"``, ``"encoder"``, ``"vision"``, ``"both"`` or ``"encoder-decoder"``.
        options: Of its config.
        auto: The class of transformers that makes it.
        rotary: Attentions whose queries and keys are rotated; all of a decoder's if not given.
    """

    name: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    auto: str = "AutoModel"
    rotary: int | None = None

    @property
    def writes(self) -> bool:
        """Whether it writes token after token, so that it should have a cache."""
        return self.kind in ("decoder", "encoder-decoder")

    def write(self, folder: Path) -> None:
        """Write a random checkpoint whose parameters are moved away from their initial values."""
        import torch
        import transformers

        torch.manual_seed(3)
        config = transformers.AutoConfig.for_model(self.name, **self.options)
        cls: Any = getattr(transformers, self.auto)
        make: Callable[..., Any] = getattr(cls, "from_config", None) or cls
        model = make(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(folder)


def _decoder(name: str, rotary: int | None = None, **options: Any) -> Family:
    return Family(name, "decoder", options, "AutoModelForCausalLM", rotary)


def _encoder(name: str, rotary: int | None = 0, **options: Any) -> Family:
    return Family(name, "encoder", {**ENCODER, **options}, rotary=rotary)


_NARROW: Final = {k: v for k, v in DECODER.items() if k != "head_dim"}  # D is E / H, 8
_TOKENS: Final = {k: DECODER[k] for k in ("vocab_size", "bos_token_id", "eos_token_id")}
_UNROTATED: Final = {"gpt2": 0, "smollm3": 1}

FAMILIES: Final[Mapping[str, Family]] = {
    family.name: family
    for family in (
        *(_decoder(n, _UNROTATED.get(n), **{**DECODER, **DECODERS[n]}) for n in DECODERS),
        _decoder("gpt_neox", **_NARROW, rotary_pct=0.5),
        _decoder("gptj", **_TOKENS, **GPT, n_inner=60, rotary_dim=4),
        _decoder(
            "falcon",
            **_NARROW,
            num_kv_heads=2,
            new_decoder_architecture=True,
            ffn_hidden_size=60,
            alibi=False,
        ),
        _decoder("bloom", 0, **_TOKENS, hidden_size=48, n_layer=2, n_head=6),
        _decoder("mpt", 0, **_TOKENS, d_model=48, n_layers=2, n_heads=6, max_seq_len=64),
        _decoder("opt", 0, **_NARROW, ffn_dim=60, word_embed_proj_dim=48),
        _decoder("starcoder2", **_NARROW, sliding_window=5),
        _decoder("cohere", **_NARROW, use_qk_norm=True),
        _decoder("olmo2", **_NARROW),
        _decoder("stablelm", **_NARROW, partial_rotary_factor=0.5, use_parallel_residual=True),
        _decoder("mixtral", **DECODER, num_local_experts=5, num_experts_per_tok=2),
        _decoder("qwen3_moe", **DECODER, **MIXTURE, num_experts=5, norm_topk_prob=True),
        _decoder(
            "deepseek_v3",
            **{**_NARROW, "num_key_value_heads": 6},
            **MIXTURE,
            q_lora_rank=20,
            kv_lora_rank=12,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=12,
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
        ),
        *(_encoder(n, **ENCODERS[n]) for n in ENCODERS),
        _encoder("albert", embedding_size=20),
        _encoder("electra", embedding_size=20),
        _encoder(
            "deberta-v2",
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=8,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            position_biased_input=False,
            type_vocab_size=0,
        ),
        _encoder(
            "modernbert", 3, num_hidden_layers=3, global_attn_every_n_layers=2, local_attention=8
        ),
        _encoder("xlm-roberta", type_vocab_size=1, max_position_embeddings=70),
        Family(
            "t5",
            "encoder-decoder",
            {
                **_TOKENS,
                "d_model": 48,
                "d_kv": 16,
                "d_ff": 60,
                "num_layers": 3,
                "num_decoder_layers": 2,
                "num_heads": 6,
                "decoder_start_token_id": 0,
            },
            "T5ForConditionalGeneration",
            0,
        ),
        Family("bart", "encoder-decoder", ENCODER_DECODER, "BartForConditionalGeneration", 0),
        Family("marian", "encoder-decoder", ENCODER_DECODER, "MarianMTModel", 0),
        Family(
            "whisper",
            "encoder-decoder",
            {
                **ENCODER_DECODER,
                "num_mel_bins": 10,
                "max_source_positions": 20,
                "max_target_positions": 64,
                "begin_suppress_tokens": None,
            },
            "WhisperForConditionalGeneration",
            0,
        ),
        Family("vit", "vision", VISION, rotary=0),
        Family("deit", "vision", VISION, rotary=0),
        Family("clip", "both", {"text_config": TEXT, "vision_config": VISION}, rotary=0),
        Family("siglip", "both", {"text_config": TEXT, "vision_config": VISION}, rotary=0),
    )
}
QUICK: Final = ("albert", "vit")
"""What ``make test`` holds to the same promises, beside a decoder of one layer."""
SLOW: Final = ("whisper",)
"""What ``make test-slow`` does: an encoder and a decoder."""
THOROUGH: Final = ("bloom", "deepseek_v3", "t5", "bart", "marian")
"""What ``make test-thorough`` does: flattened heads, keys made of parts, and the other pairs."""
