"""The commands export and generate."""
