"""What a server has done, counted for Prometheus."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram

from loramix.mix import Mix

MIXES = 100  # that have counters of their own; weights come in any number
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Meter:
    """The counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._mixes: set[str] = set()
        self.requests = self._counter("requests", "Requests by route and status.", "route status")
        self._mixed = self._counter("mix_requests", "Answered requests by mix.", "mix")
        self._mix_tokens = self._counter("mix_tokens", "Tokens of answers by mix.", "mix")
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self._generated = self._counter("generated_tokens", "Tokens of answers.")
        self._first = self._histogram("time_to_first_token_seconds", "From arrival on.")
        self._whole = self._histogram("request_seconds", "From arrival to the last token.")

    def answered(
        self,
        mixes: Sequence[Mix],
        num_prompt_tokens: int,
        num_tokens: int,
        first_s: float | None,
        whole_s: float,
    ) -> None:
        """Count what was asked together, whether it ended well or not."""
        self._prompt.inc(num_prompt_tokens)
        self._generated.inc(num_tokens)
        if first_s is not None:
            self._first.observe(first_s)
        self._whole.observe(whole_s)
        for mix in mixes:
            label = self._label(str(mix))
            self._mixed.labels(label).inc()
            self._mix_tokens.labels(label).inc(num_tokens / len(mixes))

    def _label(self, mix: str) -> str:
        """The mix, if it is among the first so many; weights are continuous, labels must not be."""
        if len(self._mixes) < MIXES:
            self._mixes.add(mix)
        return mix if mix in self._mixes else "other"

    def _counter(self, name: str, text: str, labels: str = "") -> Counter:
        return Counter(f"loramix_{name}", text, labels.split(), registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"loramix_{name}", text, buckets=SECONDS, registry=self.registry)
