"""The products of a graph, and the adapters that go into it."""
