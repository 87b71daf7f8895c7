"""Serving many adapters at once in vLLM: a command, a plugin for exact DoRA and DuDe, and offline use."""

from .offline import LoraRequests, lora_requests

__all__ = ["LoraRequests", "lora_requests"]
