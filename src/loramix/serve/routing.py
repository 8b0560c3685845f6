"""What the router would do, without doing it, and what it should have done."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from pydantic import BaseModel

from loramix.chat import Message
from loramix.errors import BadRequest, RouteError
from loramix.lm import as_messages
from loramix.route.feedback import CorrectedRouter, Correction
from loramix.serve.answering import routed
from loramix.serve.service import ADMIN, Asking, Service, Serving
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


class FeedbackGiven(Wire):
    """A query, and the adapter it belongs to; null for the base."""

    text: str
    right: str | None


class CorrectionBody(BaseModel):
    """A correction as it is kept; `joined` once the gate has learned it."""

    id: str
    text: str
    right: str | None
    joined: bool


@router.post("/v1/feedback", dependencies=ADMIN)
async def feedback(given: FeedbackGiven, service: Serving) -> CorrectionBody:
    """Correct the router; the correction is on disk, and acts, before the answer is sent."""
    made = await asyncio.to_thread(_corrected(service).correct, given.text, given.right)
    return _body(made)


@router.delete("/v1/feedback/{id}", dependencies=ADMIN)
async def undo(id: str, service: Serving) -> CorrectionBody:
    """Take a correction back."""
    return _body(await asyncio.to_thread(_corrected(service).log.undo, id))


def _corrected(service: Service) -> CorrectedRouter:
    found = service.lm.router
    if not isinstance(found, CorrectedRouter):
        raise RouteError("This server has no router that can be corrected; serve one fitted.")
    return found


def _body(made: Correction) -> CorrectionBody:
    return CorrectionBody(id=made.id, text=made.text, right=made.right, joined=made.joined)
