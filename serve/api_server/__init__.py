"""Extensions in the process of vLLM's API server: routes, API key, loading of adapters, metrics, the test page."""
