"""What the router would do, without doing it."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel

from loramix.chat import Message
from loramix.errors import BadRequest
from loramix.lm import as_messages
from loramix.serve.answering import routed
from loramix.serve.service import Asking, Serving
from loramix.serve.wire import Turn, Wire

router = APIRouter(tags=["Route"])


class RouteAsked(Wire):
    """A text, or a conversation whose last user turn counts."""

    text: str | None = None
    messages: list[Turn] | None = None


class DecisionBody(BaseModel):
    """The mix, and how probable it is for each adapter, and for none, that it fits."""

    mix: str
    weights: dict[str, float]
    scores: dict[str, float]
    none: float
    reasons: list[str]
    latency_ms: float


@router.post("/v1/route")
async def route(asked: RouteAsked, service: Serving, caller: Asking) -> DecisionBody:
    """The mix that "auto" would answer with, and why."""
    if (asked.text is None) == (asked.messages is None):
        raise BadRequest("Send text or messages to be routed, and not both.")
    turns = [Message("user", asked.text)] if asked.text is not None else None
    messages = turns or [turn.message() for turn in asked.messages or ()]
    decision = await routed(service, caller, as_messages(messages))
    return DecisionBody(
        mix=str(decision.mix),
        weights=dict(decision.mix),
        scores=dict(decision.scores),
        none=decision.none,
        reasons=list(decision.reasons),
        latency_ms=decision.latency_ms,
    )
