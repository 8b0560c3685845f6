"""Workflows: every adapter, the base, the router's choice and the default mix, run by name.

    GET    /api/workflows               those on offer to this key
    GET    /api/workflows/{id}/schema   JSON schemas of its input and output
    POST   /api/workflows/runs          {"workflow_id"?, "input": {"prompt"}, ...}   -> a task
    GET    /api/tasks/{id}              how far it is; a task that failed is an error here, too
    POST   /api/tasks/{id}/cancel       free what works for it
    DELETE /api/tasks/{id}              forget it, cancelled before if it is at work

A run is waited for unless `wait_for_completion` is false, and then it is cancelled if its client
leaves; `output_only` leaves out what is around the output; `stream` sends the text as events. With
`session_id`, a conversation's id, the run is that conversation's next turn. Tasks belong to the
key that made them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from loramix.engine import Request, Sampling
from loramix.errors import (
    BadRequest,
    Conflict,
    TaskFailed,
    UnknownAdapter,
)
from loramix.lm import as_messages
from loramix.serve.answering import MixOrAuto, planned
from loramix.serve.conversations import found_own, place_after, told
from loramix.serve.events import DONE, EventStream, event, while_connected
from loramix.serve.naming import default_mix, model_mix
from loramix.serve.openai import GONE, STREAMED
from loramix.serve.runs import Output, Run
from loramix.serve.service import Asking, Caller, Service, Serving, Trip, Way
from loramix.serve.shapes import Head
from loramix.serve.wire import Wire
from loramix.store.records import Status, Task

router = APIRouter(prefix="/api", tags=["Workflows"])
Label = str | bool | int | Annotated[float, Field(allow_inf_nan=False)] | None


class Input(Wire):
    """What every workflow takes; what is left open comes from the base's own settings."""

    prompt: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: list[str] | None = None
    enable_thinking: bool | None = None

    def sampling(self, default_tokens: int) -> Sampling:
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
            stop=tuple(self.stop or ()),
            max_tokens=default_tokens if self.max_tokens is None else self.max_tokens,
            fit=self.max_tokens is None,
        )

    def template(self) -> dict[str, Any]:
        thinks = self.enable_thinking
        return {} if thinks is None else {"enable_thinking": thinks}


class RunAsked(Wire):
    workflow_id: str | None = Field(None, description="Also any mix; none is the default one.")
    input: Input
    wait_for_completion: bool = True
    output_only: bool = False
    stream: bool = False
    session_id: str | None = Field(None, description="A conversation that this goes on in.")
    metadata: dict[str, Label] = Field(default_factory=dict, description="Kept with the task.")

    def check(self) -> None:
        """BadRequest if it asks for two kinds of response at once."""
        if self.output_only and not self.wait_for_completion:
            raise BadRequest("output_only needs the output; leave wait_for_completion true.")
        if self.stream and (self.output_only or not self.wait_for_completion):
            raise BadRequest(
                "stream is a response of its own; leave output_only and wait_for_completion out."
            )


class TaskBody(BaseModel):
    task_id: str
    status: Status
    workflow_id: str
    output: Output | None
    session_id: str | None
    metadata: dict[str, Label]
    created: float
    ended: float | None


class WorkflowBody(BaseModel):
    workflow_id: str
    title: str
    description: str
    default: bool


class SchemaBody(BaseModel):
    workflow_id: str
    input: dict[str, Any]
    output: dict[str, Any]


@router.get("/workflows")
async def list_(service: Serving, caller: Asking) -> list[WorkflowBody]:
    """The base, "auto" if there is a router, the adapters, and the default mix if it is another."""
    names = caller.names(service)
    cards = await asyncio.to_thread(service.lm.library.cards)
    about = {"base": "The base by itself."}
    if service.lm.router is not None:
        about["auto"] = "The router chooses the mix."
    about |= {card.name: card.description for card in cards if card.name in names}
    try:
        default = _id(_workflow(None, service, caller))
    except BadRequest:  # of adapters that are not on offer to this key
        default = ""
    else:
        about.setdefault(default, "The mix of requests that name none.")
    return [
        WorkflowBody(workflow_id=id, title=id, description=text, default=id == default)
        for id, text in about.items()
    ]


@router.get("/workflows/{id:path}/schema")
async def schema(id: str, service: Serving, caller: Asking) -> SchemaBody:
    """All take and give the same; 404 for a workflow that is not on offer."""
    return SchemaBody(
        workflow_id=_id(_workflow(id, service, caller)),
        input=Input.model_json_schema(),
        output=Output.model_json_schema(mode="serialization"),
    )


@router.post(
    "/workflows/runs",
    responses={200: {"model": TaskBody | Output, **STREAMED}, 202: {"model": TaskBody}},
)
async def run(
    asked: RunAsked, http: HttpRequest, service: Serving, caller: Asking, trip: Way
) -> Response:
    """Run a workflow: 200 with its output or as a stream, 202 if it is not waited for."""
    asked.check()
    made = await _made(asked, service, caller, trip)
    headers = Head((made.plan,), trip, "chat.completion").headers
    if asked.stream:
        return EventStream(service, trip, _events(made), headers)
    working = made.start()
    if not asked.wait_for_completion:
        return JSONResponse(_body(made.task).model_dump(), 202, headers)
    output = await while_connected(http.receive, made.outcome(working))
    if output is None:
        return GONE
    if asked.output_only:
        return JSONResponse(output.model_dump(), headers=headers)
    return JSONResponse(_body(await made.read()).model_dump(), headers=headers)


@router.get("/tasks/{id}")
async def show(id: str, service: Serving, caller: Asking) -> TaskBody:
    """How far a task is, and its output. TaskFailed (500) says why there will be none."""
    return _body(await asyncio.to_thread(service.kept.tasks.get, id, caller.owners))


@router.post("/tasks/{id}/cancel")
async def cancel(id: str, service: Serving, caller: Asking) -> TaskBody:
    """Conflict (409) for a task that is over. Its place in the engine is free on return."""
    if not await _cancelled(id, service, caller):
        raise Conflict(f"The task {id} is over; read it instead.")
    return await show(id, service, caller)


@router.delete("/tasks/{id}")
async def delete(id: str, service: Serving, caller: Asking) -> dict[str, str]:
    """Forget a task, its prompt and its output; one at work is cancelled before."""
    await _cancelled(id, service, caller)
    await asyncio.to_thread(service.kept.tasks.delete, id, caller.owners)
    return {"deleted": id}


async def _cancelled(id: str, service: Service, caller: Caller) -> bool:
    """Whether it was not over yet; nothing works for it any more. NoRecord for another's."""
    tasks = service.kept.tasks
    await asyncio.to_thread(tasks.get, id, caller.owners)
    if not await asyncio.to_thread(tasks.set, id, "cancelled"):
        return False
    if working := service.live.runs.get(id):
        working.cancel()
        await asyncio.wait([working])
    return True


async def _made(asked: RunAsked, service: Service, caller: Caller, trip: Trip) -> Run:
    """A run whose task is kept, not started. Whatever is wrong with the request is said here."""
    workflow = _workflow(asked.workflow_id, service, caller)
    place, messages = None, as_messages(asked.input.prompt)
    if asked.session_id is not None:
        found = await found_own(asked.session_id, service, caller)
        place = place_after(found, asked.input.prompt, service, trip)
        messages = told(found, [*found.current, *place.before])
    sampling = asked.input.sampling(service.limits.answer_tokens)
    request = Request(messages, sampling=sampling, template=asked.input.template())
    plan = await planned(service, caller, trip, request, workflow, messages)
    task = await asyncio.to_thread(
        service.kept.tasks.create,
        caller.owner,
        _id(workflow),
        asked.input.model_dump(exclude_none=True),
        session=asked.session_id or "",
        metadata=asked.metadata,
    )
    return Run(service, trip, task, plan, place)


async def _events(run: Run) -> AsyncGenerator[bytes]:
    """The text as it comes, then the task with its output; an error is the stream's to tell."""
    head = {"task_id": run.task.id, "workflow_id": run.task.workflow}
    working = run.start()
    try:
        while (text := await run.texts.get()) is not None:
            if text:
                yield event({**head, "status": "processing", "delta": text})
        await run.outcome(working)
        yield event(_body(await run.read()).model_dump())
        yield DONE
    finally:
        working.cancel()


def _workflow(id: str | None, service: Service, caller: Caller) -> MixOrAuto:
    """UnknownAdapter (404) for what is not there or not this caller's; none is the default."""
    mix = default_mix(service, caller) if id is None else model_mix(id, service, caller)
    if mix == "auto" and service.lm.router is None:
        raise UnknownAdapter("auto", ["base", *caller.names(service)])
    return mix


def _id(workflow: MixOrAuto) -> str:
    return str(workflow) or "base"


def _body(task: Task) -> TaskBody:
    if task.status == "failed":
        raise TaskFailed(task.id, task.error)
    return TaskBody(
        task_id=task.id,
        status=task.status,
        workflow_id=task.workflow,
        output=task.output,
        session_id=task.session or None,
        metadata=dict(task.metadata),
        created=task.created,
        ended=task.ended,
    )
