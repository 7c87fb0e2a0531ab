"""Reading GGUF files: metadata, quantized weights, tokenizers."""
