"""GGUF files as bases: their blocks, names, configuration, and the view as a Hugging Face checkpoint."""
