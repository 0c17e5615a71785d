"""The service's Prometheus metrics, in one place. The registry is an argument, so that every test has its own.

docs/service.md lists them all; a test holds the two together. `@histogram.time()` on an async function times only the
making of the coroutine: time with `with` blocks. Every gauge says with `multiprocess_mode` what several workers' values
are together (shared_metrics.py), and is set also without a scrape, which only one of them answers.
"""

import math

from prometheus_client import CollectorRegistry, Counter, Gauge

from service.histogram import Histogram
from service.shared_metrics import SharedRegistry

# Prometheus' own buckets start at 5 ms, where most of our answers are already out.
SECONDS = (
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.002,
    0.004,
    0.006,
    0.008,
    0.01,
    0.015,
    0.02,
    0.03,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
)
SIZES = (1, 2, 4, 8, 16, 32, 64)

# In the order in which a request passes through them.
STAGES = ("parse", "encode", "queue", "fetch", "decode", "transfer", "compute", "serialize")


class Metrics:
    """What the service counts, on the registry that it is given."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.request_seconds = Histogram(
            "lrea_request_seconds", "Time in the service", ["route"], buckets=SECONDS, registry=registry
        )
        self.stage_seconds = Histogram(
            "lrea_stage_seconds",
            "Time of each scoring answer by stage",
            ["stage"],
            buckets=SECONDS,
            registry=registry,
        )
        self.batch_requests = Histogram(
            "lrea_batch_requests", "Requests in one forward", buckets=SIZES, registry=registry
        )
        self.requests = Counter("lrea_requests_total", "Answers", ["route", "status"], registry=registry)
        self.users = Counter(
            "lrea_users_total", "Scored users by where their state came from", ["state"], registry=registry
        )
        self.degraded = Counter("lrea_degraded_total", "Degraded scores", ["reason"], registry=registry)
        self.candidates = Counter("lrea_candidates_total", "Scored candidates", registry=registry)
        self.unknown_candidates = Counter(
            "lrea_unknown_candidates_total", "Scored candidates that the model has never seen", registry=registry
        )
        self.waiting_candidates = Gauge(
            "lrea_waiting_candidates",
            "Candidates that have come and are not answered",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.expected_wait_seconds = Gauge(
            "lrea_expected_wait_seconds",
            "How long they take at the pace of the last batches",
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.batch_candidates_limit = Gauge(
            "lrea_batch_candidates_limit",
            "Candidates up to which a batch grows now: what takes 25 ms to compute, or a quarter of what waits",
            registry=registry,
            multiprocess_mode="livemin",
        )
        self.record_errors = Counter(
            "lrea_record_errors_total", "Records refused, never scored", ["reason"], registry=registry
        )
        self.user_cache_hits = Counter(
            "lrea_user_cache_hits_total", "Users of a batch who were resident", registry=registry
        )
        self.user_cache_misses = Counter(
            "lrea_user_cache_misses_total", "Users of a batch who were not resident", registry=registry
        )
        self.user_cache_evictions = Counter(
            "lrea_user_cache_evictions_total", "Resident users who gave way to another", registry=registry
        )
        self.user_cache_rejections = Counter(
            "lrea_user_cache_rejections_total",
            "Users not made resident: asked for no more often than who would have given way",
            registry=registry,
        )
        self.user_cache_full = Counter(
            "lrea_user_cache_full_total", "Users not made resident: every slot was being scored from", registry=registry
        )
        self.user_cache_wrong_owners = Counter(
            "lrea_user_cache_wrong_owners_total",
            "Slots found to hold another user, never scored: a bug, report it",
            registry=registry,
        )
        self.user_cache_users = Gauge(
            "lrea_user_cache_users", "Resident users", registry=registry, multiprocess_mode="livesum"
        )
        self.user_cache_slots = Gauge(
            "lrea_user_cache_slots", "Most resident users", registry=registry, multiprocess_mode="livesum"
        )
        self.refused_publications = Counter(
            "lrea_refused_publications_total", "Publications not adopted: the old one stays", registry=registry
        )
        self.model_info = Gauge(
            "lrea_model_info",
            "What is served (always 1)",
            ["model_id", "generation", "device"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._shown_model: Gauge | None = None
        self.store_up = Gauge(
            "lrea_store_up",
            "1 when the store answered the last question",
            registry=registry,
            multiprocess_mode="livemin",
        )
        self.store_breaker_open = Gauge(
            "lrea_store_breaker_open",
            "1 while records are not read, but for a probe",
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.store_breaker_openings = Counter(
            "lrea_store_breaker_openings_total", "Times the store's circuit opened", registry=registry
        )
        self.worker_restarts = Counter(
            "lrea_worker_restarts_total", "Workers started in place of one that ended", registry=registry
        )
        self.api_key_reloads = Counter(
            "lrea_api_key_reloads_total",
            "Changes of the file of API keys, adopted or refused",
            ["outcome"],
            registry=registry,
        )
        for outcome in ("adopted", "refused"):  # from 0 on: Prometheus sees no increase to a series' first value
            self.api_key_reloads.labels(outcome)
        self.api_key_expiry_seconds = Gauge(
            "lrea_api_key_expiry_seconds",
            "Time until the first API key expires, negative after that; +Inf where none does",
            registry=registry,
            multiprocess_mode="livemin",
        )
        # The least of several workers' values is shown: what one that still loads its model says must not be less.
        self.api_key_expiry_seconds.set(math.inf)
        self.batch_candidates_limit.set(math.inf)
        self.store_up.set(1)

    def show_breaker(self, is_open: bool) -> None:
        """The store's circuit has opened or closed."""
        self.store_breaker_open.set(is_open)
        if is_open:
            self.store_breaker_openings.inc()

    def show_model(self, model_id: str, generation: str | None, device: str) -> None:
        """Make this the one labelled model."""
        before = self._shown_model
        if not isinstance(self.registry, SharedRegistry):
            self.model_info.clear()
        self._shown_model = self.model_info.labels(model_id, generation or "", device)
        self._shown_model.set(1)
        if before is not None and before is not self._shown_model:
            before.set(0)  # the workers' files forget no label: SharedRegistry leaves zeros out
