"""Tensors on disk: checkpoints, safetensors and GGUF headers, torch pickles, reading and writing; no adapters."""
