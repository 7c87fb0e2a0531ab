"""Reads GGUF files: metadata, quantized weights, tokenizers."""
