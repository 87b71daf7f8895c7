"""GGUF files as base models: dequantisation, tensor names, configuration, and a view as a Hugging Face checkpoint."""
