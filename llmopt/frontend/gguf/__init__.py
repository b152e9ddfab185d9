"""GGUF files: config, tokenizer and weights under Hugging Face names."""
