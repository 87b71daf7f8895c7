"""Adapter layouts on disk, one file a layout; detection.py decides which one a folder has."""
