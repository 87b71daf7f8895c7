"""Planning of a merge, and its execution in blocks of rows."""
