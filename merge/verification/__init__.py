"""Comparison of artefacts with the adapter as trained: weights, logits and servers."""
