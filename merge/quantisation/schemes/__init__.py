"""One file per quantisation scheme: where its parts lie, and how they become dense rows and back."""
