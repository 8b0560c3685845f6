"""OpenAI's API: chats, completions and models. The model's name is a mix."""

from __future__ import annotations

import asyncio
from typing import Literal

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from loramix.chat import Message
from loramix.engine import Request
from loramix.errors import BadRequest, UnknownAdapter
from loramix.lm import as_messages
from loramix.serve import chats, completions
from loramix.serve.answering import answers, in_time, planned
from loramix.serve.events import EventStream, while_connected
from loramix.serve.naming import model_mix, named_mix
from loramix.serve.service import Asking, Service, Serving, Way
from loramix.serve.shapes import Head
from loramix.serve.tools import required_call
from loramix.serve.wire import ChatAsked, CompletionAsked

router = APIRouter(tags=["OpenAI"])
GONE = Response(status_code=499)  # nobody reads it; the log does
STREAMED = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}


@router.post("/v1/chat/completions", responses={200: {"model": chats.ChatCompletion, **STREAMED}})
async def chat(
    asked: ChatAsked, http: HttpRequest, service: Serving, caller: Asking, trip: Way
) -> Response:
    """Answer a conversation."""
    messages = as_messages(asked.conversation())
    request = Request(
        messages,
        sampling=asked.sampling(service.limits.answer_tokens, _schema(asked)),
        n=_few(asked.count, service),
        template=asked.template(),
    )
    plan = await planned(
        service, caller, trip, request, named_mix(asked, service, caller), messages
    )
    head = Head((plan,), trip, "chat.completion")
    tools = [tool.function.name for tool in asked.tools or ()]
    tools = [] if asked.tool_choice == "none" else tools
    engine, chunks = service.lm.engine, answers(service, trip, head.plans)
    if asked.stream:
        with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        events = chats.events(head, chunks, engine, tools, with_usage=with_usage)
        return EventStream(service, trip, events, head.headers)
    async with in_time(service, trip):
        body = await while_connected(http.receive, chats.whole(head, chunks, engine, tools))
    return GONE if body is None else JSONResponse(body, headers=head.headers)


@router.post("/v1/completions", responses={200: {"model": completions.TextCompletion, **STREAMED}})
async def complete(
    asked: CompletionAsked, http: HttpRequest, service: Serving, caller: Asking, trip: Way
) -> Response:
    """Continue texts or tokens."""
    sampling = asked.sampling(service.limits.answer_tokens)
    prompts = asked.prompts()
    if not prompts or not all(prompts):
        raise BadRequest("prompt is empty; expected at least one token in each.")
    n = asked.count
    _few(n * len(prompts), service)
    engine = service.lm.engine
    texts = [
        text if isinstance(text, str) else await asyncio.to_thread(_read, text, service)
        for text in prompts
    ]
    mix = named_mix(asked, service, caller)
    plans = [
        await planned(
            service,
            caller,
            trip,
            Request(prompt, sampling=sampling, n=n),
            mix,
            (Message("user", text),),
        )
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    head = Head(plans, trip, "text_completion")
    manner = completions.Manner(
        echoes=tuple(texts) if asked.echo else (),
        n=n,
        with_logprobs=asked.logprobs is not None,
        hides_answer=bool(asked.echo) and asked.max_tokens == 0,
    )
    chunks = answers(service, trip, plans)
    if asked.stream:
        with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        events = completions.events(head, chunks, engine, manner, with_usage=with_usage)
        return EventStream(service, trip, events, head.headers)
    async with in_time(service, trip):
        body = await while_connected(http.receive, completions.whole(head, chunks, engine, manner))
    return GONE if body is None else JSONResponse(body, headers=head.headers)


class ModelBody(BaseModel):
    """Something that `model` can be; mixes of the adapters listed are models too."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "loramix"
    root: str
    parent: str | None
    description: str = ""


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelBody]


@router.get("/v1/models")
async def models(service: Serving, caller: Asking) -> ModelList:
    """The base, "auto" if there is a router, and the adapters."""
    base = service.lm.engine.base_id
    listed = [_model(base, None, "The base by itself.", service)]
    if service.lm.router is not None:
        listed.append(_model("auto", base, "The router chooses the mix.", service))
    names = caller.names(service)
    cards = await asyncio.to_thread(service.lm.library.cards)
    listed += [
        _model(card.name, base, card.description, service) for card in cards if card.name in names
    ]
    return ModelList(data=listed)


@router.get("/v1/models/{id:path}")
async def model(id: str, service: Serving, caller: Asking) -> ModelBody:
    """One of them, or any mix by its name."""
    base = service.lm.engine.base_id
    if id == "auto" and service.lm.router is None:
        raise UnknownAdapter(id, [base])
    mix = model_mix(id, service, caller)
    if mix == "auto" or not mix:
        return _model(base if mix != "auto" else "auto", None if not mix else base, "", service)
    return _model(str(mix), base, "", service)


def _model(id: str, parent: str | None, description: str, service: Service) -> ModelBody:
    return ModelBody(
        id=id, created=service.live.started, root=id, parent=parent, description=description
    )


def _schema(asked: ChatAsked) -> str | None:
    """The JSON schema that the answer has to follow, by its format or as a call."""
    call = required_call(asked.tools or (), asked.tool_choice)
    schema = asked.response_format.schema() if asked.response_format else None
    if call and schema:
        raise BadRequest("response_format and a required tool call exclude each other; drop one.")
    return call or schema


def _few(count: int, service: Service) -> int:
    if count > service.limits.n:
        raise BadRequest(
            f"n is too much: {count} answers are asked for together; expected {service.limits.n} "
            f"at most."
        )
    return count


def _read(tokens: tuple[int, ...], service: Service) -> str:
    """A prompt of tokens as text: what the router sees, and what echo shows."""
    try:
        return service.lm.engine.text(tokens)
    except (OverflowError, TypeError, ValueError) as error:
        raise BadRequest("A token of the prompt is not one of this base's.") from error
