"""Quantised base models: their detection, and one file per scheme that dequantises and requantises weights."""
