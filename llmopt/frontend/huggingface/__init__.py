"""Hugging Face folders: config, weights, tokenizer, chat template, and the module behind them."""
