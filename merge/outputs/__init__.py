"""Files that are written beside the weights, and the publishing, resuming and checking of output folders."""
