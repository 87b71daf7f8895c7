"""Put trained adapters into production: merge, factor, export, serve, and verify them."""
