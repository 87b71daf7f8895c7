"""Quantised checkpoints: weights that are stored as packed numbers and scales, read as dense weights."""
