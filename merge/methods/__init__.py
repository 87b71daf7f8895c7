"""The mathematics of each method, one file a method. Knows nothing of files."""
