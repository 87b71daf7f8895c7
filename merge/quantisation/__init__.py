"""Bases whose weights are stored quantised: their detection, and one file per scheme that reads and writes them."""
