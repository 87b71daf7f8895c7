"""The plan of a merge, and its streaming execution."""
