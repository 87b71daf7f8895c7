"""From a checkpoint to a graph, in processes of their own."""
