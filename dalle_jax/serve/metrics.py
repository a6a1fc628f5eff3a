"""What the server counts, in Prometheus' text format."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)


class Metrics:
    """Counters of one server."""

    def __init__(self):
        self._registry = registry = CollectorRegistry()
        self.responses = Counter(
            "dalle_jax_responses", "By path and status", ["path", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "dalle_jax_request_seconds",
            "From a request for images to its last one",
            buckets=SECONDS,
            registry=registry,
        )
        self.images = Counter("dalle_jax_images", "Images sampled", registry=registry)
        self.pending = Gauge(
            "dalle_jax_pending_images", "Images accepted and not finished", registry=registry
        )
        self.batch_size = Histogram(
            "dalle_jax_batch_size", "Images", buckets=[2**k for k in range(6)], registry=registry
        )
        self.batch_seconds = Histogram(
            "dalle_jax_batch_seconds", "Time per batch", buckets=SECONDS, registry=registry
        )

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self._registry)
