"""Artefacts compared with the adapter as trained."""
