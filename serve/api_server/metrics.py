"""Figures of the adapters at /metrics, beside vLLM's own, in its registry of the API server's process.

adapter_merge_requests_total{adapter}        accepted requests; the base has its own name
adapter_merge_refused_total{reason}          refused requests: unknown (no such name) or unservable (an error)
adapter_merge_conversion_seconds             count and sum over conversions; adapters in the cache do not count
adapter_merge_conversion_failures_total
adapter_merge_refreshes_total{adapter}       reloads of adapters that were replaced on disk
adapter_merge_cache_bytes, adapter_merge_cache_entries
                                             size of the whole cache after the last conversion
"""

from __future__ import annotations

from adapter_merge.serve.conversion.cache import Cache

UNKNOWN, UNSERVABLE = "unknown", "unservable"


class Metrics:
    """The collectors of one process. Create it once: prometheus_client refuses a second instance."""

    def __init__(self) -> None:
        from prometheus_client import Counter, Gauge, Summary  # vLLM depends on it

        self.requests = Counter("adapter_merge_requests", "Accepted requests.", ["adapter"])
        self.refused = Counter("adapter_merge_refused", "Requests for a name that was not served.", ["reason"])
        self.conversions = Summary("adapter_merge_conversion_seconds", "Conversions of adapters.")
        self.failures = Counter("adapter_merge_conversion_failures", "Adapters that could not be converted.")
        self.refreshes = Counter("adapter_merge_refreshes", "Replaced adapters that were loaded again.", ["adapter"])
        self.cache_bytes = Gauge(
            "adapter_merge_cache_bytes", "Size of the cache of adapters.", multiprocess_mode="mostrecent"
        )
        self.cache_entries = Gauge(
            "adapter_merge_cache_entries", "Adapters in the cache.", multiprocess_mode="mostrecent"
        )
        for reason in (UNKNOWN, UNSERVABLE):
            self.refused.labels(reason)  # shown as 0 before the first

    def count_conversion(self, seconds: float, cache: Cache) -> None:
        """Count a conversion of `seconds` and update the size of the cache."""
        self.conversions.observe(seconds)
        self.measure(cache)

    def measure(self, cache: Cache) -> None:
        """Update the size of the cache."""
        entries = cache.entries()
        self.cache_bytes.set(sum(entry.nbytes for entry in entries))
        self.cache_entries.set(len(entries))
