"""Attention, rotary embedding and the KV cache."""
