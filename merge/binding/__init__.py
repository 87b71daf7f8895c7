"""Where the weight of each adapted module lies in a checkpoint."""
