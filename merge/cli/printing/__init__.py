"""What the command line prints: lines, JSON, progress, errors, results."""
