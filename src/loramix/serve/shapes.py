"""What responses of OpenAI's kind have in common."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from loramix.lm import Plan
from loramix.mix import Mix
from loramix.route import Decision
from loramix.serve.service import Trip


class NearBody(BaseModel):
    """A stored example that is like the query."""

    adapter: str
    text: str
    cosine: float


class Chosen(BaseModel):
    """Which mix answered, and why: the `loramix` object of an answer."""

    mix: str
    scores: dict[str, float]
    none: float | None
    reasons: list[str]
    nearest: list[NearBody]
    words: list[str]
    coldness: float
    trace_id: str
    route_ms: float


def why(decision: Decision | None) -> dict[str, Any]:
    """A decision's scores and reasons; without one, of a mix that was given, nothing."""
    found = decision or Decision(Mix(), {}, 0.0, (), 0.0)
    return {
        "scores": dict(found.scores),
        "none": decision and decision.none,
        "reasons": list(found.reasons),
        "nearest": [near._asdict() for near in found.nearest],
        "words": list(found.words),
        "coldness": found.coldness,
    }


class UsageBody(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class Head:
    """What every object of one response begins with."""

    plans: Sequence[Plan]
    trip: Trip
    kind: str
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def model(self) -> str:
        """The mix that answers; "auto" if prompts of one request got different ones."""
        mixes = {str(plan.request.mix) for plan in self.plans}
        return mixes.pop() if len(mixes) == 1 else "auto"

    @property
    def headers(self) -> dict[str, str]:
        return {"x-loramix-mix": self.model}

    def fields(self, suffix: str = "") -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.kind.startswith('chat') else 'cmpl'}-{self.id}",
            "object": self.kind + suffix,
            "created": self.created,
            "model": self.model,
        }

    def chosen(self) -> Mapping[str, Any]:
        """The `loramix` object; of several prompts, that of the first."""
        plan = self.plans[0]
        return {
            "mix": str(plan.request.mix),
            **why(plan.decision),
            "trace_id": self.trip.trace,
            "route_ms": plan.decision.latency_ms if plan.decision else 0.0,
        }


def usage(num_prompt: int, num_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt + num_tokens,
    }
