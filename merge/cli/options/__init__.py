"""What the command line takes: types of values, shared options, inputs, defaults from a file."""
