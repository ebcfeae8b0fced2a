"""What the server counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

_SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 5)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Metrics:
    """Counters and histograms of one server, and its memory and CPU seconds (``process_*``)."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("serve_requests", "Requests to /predict, by form.", ["form"], registry=registry)
        self.errors = Counter("serve_errors", "Requests not answered, by kind.", ["kind"], registry=registry)
        self.seconds = Histogram(
            "serve_request_seconds",
            "From the request's header to its answer.",
            ["form"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.model_seconds = Histogram(
            "serve_model_seconds", "The model alone, a joint batch.", buckets=_SECONDS, registry=registry
        )
        self.batch_size = Histogram(
            "serve_request_examples", "Examples of a request.", buckets=_SIZES, registry=registry
        )
        self.joint_batch_size = Histogram(
            "serve_model_examples", "Examples that the model saw at once.", buckets=_SIZES, registry=registry
        )
        self.rows = Counter("serve_rows_looked_up", "Ids that were looked up.", registry=registry)
        self.bad_ids = Counter(
            "serve_bad_ids", "Ids that are no rows of their table, by feature.", ["feature"], registry=registry
        )
        self.waiting = Gauge("serve_waiting_requests", "Requests that wait for a thread.", registry=registry)
        self.table_bytes = Gauge("serve_table_bytes", "Bytes of the embedding tables.", registry=registry)
        self.reloads = Counter("serve_reloads", "Reloads of the artifact, by outcome.", ["outcome"], registry=registry)
