"""Binding: finds the stored weight of each adapted module in a checkpoint."""
