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
from loramix.serve.service import ADMIN, Asking, Service, Serving, Way
from loramix.serve.shapes import NearBody, why
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
    nearest: list[NearBody]
    words: list[str]
    coldness: float
    trace_id: str
    latency_ms: float


@router.post("/v1/route")
async def route(asked: RouteAsked, service: Serving, caller: Asking, trip: Way) -> DecisionBody:
    """The mix that "auto" would answer with, and why."""
    if (asked.text is None) == (asked.messages is None):
        raise BadRequest("Send text or messages to be routed, and not both.")
    turns = [Message("user", asked.text)] if asked.text is not None else None
    messages = turns or [turn.message() for turn in asked.messages or ()]
    decision = await routed(service, caller, trip, as_messages(messages))
    return DecisionBody(
        mix=str(decision.mix),
        weights=dict(decision.mix),
        **why(decision),
        trace_id=decision.trace,
        latency_ms=decision.latency_ms,
    )


class FeedbackGiven(Wire):
    """A query, or the trace id of one, and the adapter it belongs to; null for the base."""

    text: str | None = None
    trace_id: str | None = None
    right: str | None

    def query(self, service: Service) -> str:
        """BadRequest for a trace id that is forgotten, or never was."""
        if (self.text is None) == (self.trace_id is None):
            raise BadRequest("Send a text or a trace_id to be corrected, and not both.")
        found = self.text or service.live.routed.get(self.trace_id or "")
        if found is None:
            raise BadRequest(
                f"No text was routed as {self.trace_id!r} of late; send the text instead."
            )
        return found


class CorrectionBody(BaseModel):
    """A correction as it is kept; `joined` once the gate has learned it."""

    id: str
    text: str
    right: str | None
    joined: bool


@router.post("/v1/feedback", dependencies=ADMIN)
async def feedback(given: FeedbackGiven, service: Serving) -> CorrectionBody:
    """Correct the router; the correction is on disk, and acts, before the answer is sent."""
    router, query = _corrected(service), given.query(service)
    made = await asyncio.to_thread(router.correct, query, given.right)
    return _body(made)


class CorrectionList(BaseModel):
    data: list[CorrectionBody]


@router.get("/v1/feedback", dependencies=ADMIN)
async def list_corrections(service: Serving) -> CorrectionList:
    """All that were not taken back, oldest first."""
    found = await asyncio.to_thread(_corrected(service).log.corrections)
    return CorrectionList(data=[_body(each) for each in found])


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
