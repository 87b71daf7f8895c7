"""Merged, switchable and batched exports."""
