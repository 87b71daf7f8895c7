"""Files, paths and text from outside: hashes, locks, links, snapshots, the hub. Nothing here depends on tensors."""
