"""Bytes and files: checkpoints, headers, pickles, hashes, links, locks. Knows nothing of adapters."""
