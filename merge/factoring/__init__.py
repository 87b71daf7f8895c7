"""Low-rank factors of an adapter, exact or truncated with a certificate."""
