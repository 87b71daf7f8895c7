"""Low-rank factors of an adapter: exact, or truncated with measured errors (the certificate)."""
