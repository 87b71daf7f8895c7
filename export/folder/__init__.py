"""An export's folder: its manifest, its card, and how it changes."""
