"""What is written beside the weights, and how a folder is published, resumed and proved."""
