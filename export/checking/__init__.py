"""Exports against the live model."""
