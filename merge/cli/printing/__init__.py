"""Printing of lines, JSON, progress, errors and results on the command line."""
