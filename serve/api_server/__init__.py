"""What runs in the process of vLLM's API server: routes, key, loading of adapters, metrics, the page to try them."""
