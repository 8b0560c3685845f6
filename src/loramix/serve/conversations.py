"""Conversations that are kept. They belong to the key that made them.

    POST   /v1/conversations                  {"title"?, "system"?}           -> the conversation
    GET    /v1/conversations?limit=&after=    the last changed first, without turns
    GET    /v1/conversations/{id}             with its turns; /export is the same as a file
    PATCH  /v1/conversations/{id}             {"title"?, "system"?}
    DELETE /v1/conversations/{id}
    POST   /v1/conversations/{id}/turns       {"content", "mix"?, "stream"?, ...} -> {"turns": [2]}
    POST   /v1/conversations/{id}/regenerate  {"mix"?, "stream"?, ...}            -> {"turns": [1]}

The last two take the mix and the sampling of a chat completion. A stream has a chat completion's
events, and before [DONE] one more, {"object": "conversation.turns", "turns": [...]}: what is now
kept. A question and its answer are kept together, when the answer has ended; if its reader leaves
a stream before, what there is of it is kept with `finish` "cancelled". An answer that is given
again is a new `version` of its turn: all are listed, and the highest one is the conversation's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from loramix.chat import Message
from loramix.engine import Request, Sampling
from loramix.errors import BadRequest
from loramix.lm import as_messages
from loramix.serve import chats
from loramix.serve.answering import Numbered, answers, check_system, in_time, planned
from loramix.serve.events import DONE, EventStream, event, while_connected
from loramix.serve.naming import named_mix
from loramix.serve.openai import GONE, STREAMED
from loramix.serve.service import Asking, Caller, Service, Serving, Trip, Way
from loramix.serve.shapes import Head
from loramix.serve.wire import Asked, Wire
from loramix.store.records import Conversation, Turn

router = APIRouter(prefix="/v1/conversations", tags=["Conversations"])
log = logging.getLogger("loramix.serve")
Title = Annotated[str, Field(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]


class ConversationAsked(Wire):
    title: Title | None = None
    system: str | None = None  # "" is none: then its adapter's own counts, if that has one


class ReplyAsked(Asked):
    """How the last question is to be answered again."""

    enable_thinking: bool | None = None

    def sampling(self, default_tokens: int) -> Sampling:
        if self.count != 1:
            raise BadRequest(f"n is {self.count}; expected 1: a turn is one answer.")
        schema = self.response_format.schema() if self.response_format else None
        return self._sampling(default_tokens, schema=schema)

    def template(self) -> dict[str, Any]:
        thinks = self.enable_thinking
        return {} if thinks is None else {"enable_thinking": thinks}


class TurnAsked(ReplyAsked):
    """The next question."""

    content: str


class TurnBody(BaseModel):
    number: int
    version: int
    role: Literal["user", "assistant"]
    content: str
    mix: str
    scores: dict[str, float]
    none: float | None
    reasons: list[str]
    prompt_tokens: int
    completion_tokens: int
    ms: float
    finish: str
    trace: str
    created: float


class TurnsBody(BaseModel):
    object: Literal["conversation.turns"] = "conversation.turns"
    turns: list[TurnBody]


class ConversationHead(BaseModel):
    id: str
    title: str
    system: str
    created: float
    changed: float


class ConversationBody(ConversationHead):
    turns: list[TurnBody]


class ConversationList(BaseModel):
    data: list[ConversationHead]
    next: str | None  # where the list goes on, as `after`


@router.post("", status_code=201)
async def create(asked: ConversationAsked, service: Serving, caller: Asking) -> ConversationBody:
    check_system(asked.system)
    made = await asyncio.to_thread(
        service.kept.conversations.create,
        caller.owner,
        title=asked.title or "",
        system=asked.system or "",
    )
    return _body(made)


@router.get("")
async def list_(
    service: Serving,
    caller: Asking,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str | None, Query(pattern=r"^[0-9]+\.[0-9]+-[0-9a-f]{32}$")] = None,
) -> ConversationList:
    """`after` is the `next` of the part of the list before."""
    changed, _, id = (after or "").partition("-")
    before = (float(changed), id) if after else None
    listed = await asyncio.to_thread(
        service.kept.conversations.list, caller.owners, limit=limit, before=before
    )
    heads = [ConversationHead.model_validate(each, from_attributes=True) for each in listed]
    more = f"{heads[-1].changed}-{heads[-1].id}" if len(heads) == limit else None
    return ConversationList(data=heads, next=more)


@router.get("/{id}")
async def show(id: str, service: Serving, caller: Asking) -> ConversationBody:
    return _body(await found_own(id, service, caller))


@router.get("/{id}/export")
async def export(id: str, service: Serving, caller: Asking, response: Response) -> ConversationBody:
    """The same, as a file to be kept elsewhere."""
    found = await found_own(id, service, caller)
    disposition = f'attachment; filename="conversation-{found.id}.json"'
    response.headers["content-disposition"] = disposition
    return _body(found)


@router.patch("/{id}")
async def change(
    id: str, asked: ConversationAsked, service: Serving, caller: Asking
) -> ConversationBody:
    """Rename it, or give it another system prompt from the next answer on."""
    if asked.title is None and asked.system is None:
        raise BadRequest("The patch says nothing; send a title or a system prompt.")
    check_system(asked.system)
    store = service.kept.conversations
    return _body(
        await asyncio.to_thread(
            store.change, id, caller.owners, title=asked.title, system=asked.system
        )
    )


@router.delete("/{id}")
async def delete(id: str, service: Serving, caller: Asking) -> dict[str, str]:
    await asyncio.to_thread(service.kept.conversations.delete, id, caller.owners)
    return {"deleted": id}


@router.post("/{id}/turns", responses={200: {"model": TurnsBody, **STREAMED}})
async def append(
    id: str, asked: TurnAsked, http: HttpRequest, service: Serving, caller: Asking, trip: Way
) -> Response:
    """Ask the next question."""
    found = await found_own(id, service, caller)
    place = place_after(found, asked.content, service, trip)
    return await _answered(asked, place, [*found.current, *place.before], http, caller)


@router.post("/{id}/regenerate", responses={200: {"model": TurnsBody, **STREAMED}})
async def regenerate(
    id: str, asked: ReplyAsked, http: HttpRequest, service: Serving, caller: Asking, trip: Way
) -> Response:
    """Answer the last question again, under another mix perhaps."""
    found = await found_own(id, service, caller)
    if not found.turns:
        raise BadRequest("The conversation has no answer yet; ask the first question.")
    *history, last = found.current
    place = Place(
        service, trip, found, (), Turn("assistant", "", last.number, version=last.version + 1)
    )
    return await _answered(asked, place, history, http, caller)


@dataclass(frozen=True, slots=True)
class Place:
    """Where an answer goes, after the turns that come with it."""

    service: Service
    trip: Trip
    conversation: Conversation
    before: tuple[Turn, ...]
    empty: Turn

    async def keep(self, head: Head, chunks: Sequence[Numbered], finish: str) -> TurnsBody:
        """Commit the answer; Conflict if another one was given meanwhile."""
        said, last = head.chosen(), chunks[-1][1]
        turn = replace(
            self.empty,
            content="".join(chunk.text for _, chunk in chunks).replace("\0", "\ufffd"),
            mix=said["mix"],
            scores=said["scores"],
            none=said["none"],
            reasons=tuple(said["reasons"]),
            prompt_tokens=last.num_prompt_tokens,
            completion_tokens=sum(chunk.num_tokens for _, chunk in chunks),
            ms=self.trip.age_s * 1000,
            finish=finish,
            trace=self.trip.trace,
        )
        store = self.service.kept.conversations
        kept = await asyncio.to_thread(store.append, self.conversation.id, (*self.before, turn))
        return TurnsBody(turns=[_turn(turn) for turn in kept])


def place_after(found: Conversation, content: str, service: Service, trip: Trip) -> Place:
    """Where the answer to the next question goes, with that question."""
    number = len(found.current)
    question = Turn("user", content, number, trace=trip.trace)
    return Place(service, trip, found, (question,), Turn("assistant", "", number + 1))


def told(conversation: Conversation, turns: Sequence[Turn]) -> tuple[Message, ...]:
    """What the model reads: the system prompt, then these turns. BadRequest for bad texts."""
    system = [Message("system", conversation.system)] if conversation.system else []
    return as_messages([*system, *(Message(turn.role, turn.content) for turn in turns)])


async def _answered(
    asked: ReplyAsked, place: Place, history: Sequence[Turn], http: HttpRequest, caller: Caller
) -> Response:
    service, trip = place.service, place.trip
    messages = told(place.conversation, history)
    sampling = asked.sampling(service.limits.answer_tokens)
    request = Request(messages, sampling=sampling, template=asked.template())
    plan = await planned(
        service, caller, trip, request, named_mix(asked, service, caller), messages
    )
    head = Head((plan,), trip, "chat.completion")
    if asked.stream:
        with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        events = _events(place, head, with_usage=with_usage)
        return EventStream(service, trip, events, head.headers)
    async with in_time(service, trip):
        body = await while_connected(http.receive, _whole(place, head))
    return GONE if body is None else JSONResponse(body.model_dump(), headers=head.headers)


async def _whole(place: Place, head: Head) -> TurnsBody:
    async with aclosing(answers(place.service, place.trip, head.plans)) as stream:
        chunks = [numbered async for numbered in stream]
    return await place.keep(head, chunks, chunks[-1][1].finish or "cancelled")


async def _events(place: Place, head: Head, *, with_usage: bool) -> AsyncGenerator[bytes]:
    """A chat's events; the answer is kept before its reader is told that it has ended."""
    kept: list[TurnsBody] = []
    chunks = _kept(place, head, kept)
    engine = place.service.lm.engine
    async with aclosing(chats.events(head, chunks, engine, (), with_usage=with_usage)) as events:
        async for data in events:
            if data == DONE:
                yield event(kept[0].model_dump())
            yield data


async def _kept(place: Place, head: Head, kept: list[TurnsBody]) -> AsyncGenerator[Numbered]:
    chunks: list[Numbered] = []
    try:
        async with aclosing(answers(place.service, place.trip, head.plans)) as stream:
            async for numbered in stream:
                chunks.append(numbered)
                if finish := numbered[1].finish:
                    kept.append(await place.keep(head, chunks, finish))
                yield numbered
    except (GeneratorExit, asyncio.CancelledError):
        if chunks and not kept:
            _keep_later(place, head, chunks)
        raise


def _keep_later(place: Place, head: Head, chunks: Sequence[Numbered]) -> None:
    """Keep what there is; whoever read it has left, so that only the log can tell of a failure."""
    writes = place.service.live.writes
    task = asyncio.create_task(place.keep(head, chunks, "cancelled"))
    writes.add(task)

    def note(task: asyncio.Task[TurnsBody]) -> None:
        writes.discard(task)
        if not task.cancelled() and (error := task.exception()):
            facts = {"trace": place.trip.trace, "error": str(error)}
            log.error("A stopped answer is lost.", extra={"facts": facts})

    task.add_done_callback(note)


async def found_own(id: str, service: Service, caller: Caller) -> Conversation:
    return await asyncio.to_thread(service.kept.conversations.get, id, caller.owners)


def _turn(turn: Turn) -> TurnBody:
    return TurnBody.model_validate(turn, from_attributes=True)


def _body(found: Conversation) -> ConversationBody:
    return ConversationBody.model_validate(found, from_attributes=True)
