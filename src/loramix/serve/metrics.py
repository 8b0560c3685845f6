"""Is it alive, is it ready, what is it doing: for whoever looks after the server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import time
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from loramix.engine import Statistics
from loramix.mix import Mix
from loramix.serve.service import Asking, Service, Serving

router = APIRouter(tags=["State"])
TEXT: dict[str, Any] = {"content": {"text/plain": {"schema": {"type": "string"}}}}


@router.get("/health")
async def health(service: Serving) -> Response:
    """200 while the engine lives."""
    alive = service.lm.engine.statistics().is_open
    return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)


@router.get("/ready")
async def ready(service: Serving) -> Response:
    """200 while new requests are taken."""
    able = service.lm.engine.statistics().is_open and not service.live.is_ending
    return JSONResponse({"status": "ready" if able else "not ready"}, 200 if able else 503)


@router.get("/metrics", responses={200: TEXT})
async def metrics(service: Serving, caller: Asking) -> Response:
    """Counters in Prometheus' text format; for admins, as labels name adapters and mixes."""
    caller.require_admin()
    now = CollectorRegistry()
    now.register(_Moment(service))
    text = generate_latest(service.meter.registry) + generate_latest(now)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


class _Moment(Collector):
    """What the engine is doing, as it is asked."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        seen = self._service.lm.engine.statistics()
        yield _gauge("requests_running", "Answers at work: the batch.", len(seen.running))
        yield _gauge("requests_waiting", "Answers in the queue.", len(seen.waiting))
        yield _gauge("kv_used_bytes", "Keys and values, reserved or kept.", seen.kv_used_bytes)
        yield _gauge("kv_limit_bytes", "Keys and values, at most.", seen.kv_limit_bytes)
        yield _gauge("adapters_loaded", "Adapters in memory.", len(seen.adapters))
        yield _count("steps", "Forward passes.", seen.num_steps)
        yield _count("prefix_tokens", "Tokens of prompts that began.", seen.num_prompt_tokens)
        yield _count("prefix_hit_tokens", "Of these, not computed anew.", seen.num_cached_tokens)
        yield _vllm(seen)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"loramix_{name}", text, value=value)


def _count(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"loramix_{name}", text, value=value)


def _vllm(seen: Statistics) -> Metric:
    """What gateways that balance by adapter look for, under the name they know; set to the time."""
    info = GaugeMetricFamily(
        "vllm:lora_requests_info",
        "Adapters at work and waited for.",
        labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
    )
    adapters = str(max(1, len(seen.adapters)))
    info.add_metric([adapters, _names(seen.running), _names(seen.waiting)], time())
    return info


def _names(mixes: Sequence[Mix]) -> str:
    return ",".join(sorted({name for mix in mixes for name in mix}))
