"""Files, paths and text from outside: hashes, locks, links, snapshots, the hub. Knows no tensors."""
