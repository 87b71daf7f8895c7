"""Options and inputs of the commands: types of values, shared options, inputs, defaults from a file."""
