"""Adapters in any form, as folders that vLLM loads: their conversion, its cache, and what is stated of them."""
