"""The commands serve and cache."""
