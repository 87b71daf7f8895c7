"""Exports under onnxruntime: sessions, KV caches, prompts."""
