"""The demonstration on SmolLM2-135M-Instruct and its two trained adapters."""
