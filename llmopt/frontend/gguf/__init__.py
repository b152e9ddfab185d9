"""GGUF files: config, tokenizer and weights in the words of Hugging Face."""
