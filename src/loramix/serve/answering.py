"""From messages and a mix to an answer as it comes: what all surfaces share."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Sequence, Set
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Literal

from loramix.chat import Message
from loramix.engine import Chunk, Engine, Request
from loramix.errors import (
    AdapterError,
    Ending,
    EngineError,
    LoramixError,
    RouterFailed,
    TookTooLong,
)
from loramix.lm import Plan, as_messages, guided
from loramix.mix import Mix
from loramix.route import Decision
from loramix.route.turns import user_turns
from loramix.serve.service import Caller, Service, Trip

MixOrAuto = Mix | Literal["auto"]
Numbered = tuple[int, Chunk]  # a chunk, and the place of its request among those asked together


async def planned(
    service: Service,
    caller: Caller,
    trip: Trip,
    request: Request,
    mix: MixOrAuto,
    query: Sequence[Message],
) -> Plan:
    """The request under its mix; `query` is what the router is asked with if that is "auto".

    Raises UnknownAdapter also for adapters that the caller may not use, RouteError if there is no
    router, RouterFailed if it breaks.
    """
    decision = await routed(service, caller, trip, query) if mix == "auto" else None
    chosen = decision.mix if decision else mix
    assert isinstance(chosen, Mix)
    caller.require(chosen, service)
    prompt = request.prompt
    if prompt and isinstance(prompt[0], Message):
        messages = [part for part in prompt if isinstance(part, Message)]
        prompt = guided(messages, chosen, service.prompt_of)
    return Plan(replace(request, mix=chosen, prompt=prompt), decision)


def check_system(prompt: str | None) -> None:
    """BadRequest for a system prompt that no chat could begin with."""
    if prompt:
        as_messages([Message("system", prompt), Message("user", "?")])


async def routed(
    service: Service, caller: Caller, trip: Trip, query: Sequence[Message]
) -> Decision:
    """What the router makes of a conversation, within the adapters that the caller may use.

    Its trace id is that of the request.
    """
    turns = as_messages(query)
    try:
        decision = await asyncio.to_thread(service.lm.route, turns)
    except LoramixError:
        raise
    except Exception as error:
        raise RouterFailed(
            f"The router failed with {error!r}; name a mix instead, or try again later."
        ) from error
    if not all(map(math.isfinite, (*decision.scores.values(), decision.none))):
        raise RouterFailed("The router failed: it gave no number as a probability; name a mix.")
    service.live.remember(trip.trace, user_turns(turns)[-1])
    return _within(replace(decision, trace=trip.trace), set(caller.names(service)))


def _within(decision: Decision, names: Set[str]) -> Decision:
    """The decision as if there were only the adapters on offer.

    Of a mix of shares, which sum to one, those that are left do so again. What belongs to another
    adapter belongs to none here, so nobody learns what others have.
    """
    if names >= decision.scores.keys():
        return decision
    scores = {name: score for name, score in decision.scores.items() if name in names}
    left = Mix({name: weight for name, weight in decision.mix.items() if name in names})
    weights = decision.mix.values()
    if left and min(weights) > 0 and math.isclose(sum(weights), 1, abs_tol=1e-3):
        left *= 1 / sum(left.values())
    reason = f"{left}: what fits" if left else "base: nothing fits"
    hidden = decision.scores.keys() - names
    told = (each for each in decision.reasons if not any(name in each for name in hidden))
    reasons = (f"{reason} of the adapters on offer to this key", *told)
    none = max(0.0, 1 - sum(scores.values()))
    return Decision(left, scores, none, reasons, decision.latency_ms, trace=decision.trace)


async def answers(service: Service, trip: Trip, plans: Sequence[Plan]) -> AsyncGenerator[Numbered]:
    """The chunks of several requests as they come. Closing cancels them all.

    Raises what the engine's `stream` does.
    """
    first_s, num_tokens, num_prompt_tokens = None, 0, 0
    try:
        async with aclosing(_merged(service, plans)) as merged:
            async for number, chunk in merged:
                first_s = first_s or trip.age_s
                num_tokens += chunk.num_tokens
                num_prompt_tokens += chunk.num_prompt_tokens if chunk.index == 0 else 0
                yield number, chunk
    except AdapterError as error:  # a file of the library is damaged: no fault of the request
        raise EngineError(str(error)) from error
    except EngineError as error:
        if service.live.is_ending and error.status >= 500:
            raise Ending from error
        raise
    finally:
        mixes = [plan.request.mix for plan in plans]
        service.meter.answered(mixes, num_prompt_tokens, num_tokens, first_s, trip.age_s)
        if service.log_prompts:
            trip.facts["prompts"] = [repr(plan.request.prompt) for plan in plans]
        trip.facts.update(
            mix="; ".join(dict.fromkeys(map(str, mixes))),
            prompt_tokens=num_prompt_tokens,
            completion_tokens=num_tokens,
            first_token_ms=None if first_s is None else round(first_s * 1000, 2),
        )


@asynccontextmanager
async def in_time(service: Service, trip: Trip) -> AsyncIterator[None]:
    """TookTooLong if the block has not ended when the time that a request may take is over."""
    try:
        async with asyncio.timeout(service.limits.timeout_s - trip.age_s):
            yield
    except TimeoutError as error:
        raise TookTooLong(
            f"The answer took longer than {service.limits.timeout_s:g} s; ask for fewer tokens, or "
            f"try again when there is less to do."
        ) from error


async def _merged(service: Service, plans: Sequence[Plan]) -> AsyncGenerator[Numbered]:
    if len(plans) == 1:
        async with aclosing(_stream(service.lm.engine, plans[0].request)) as stream:
            async for chunk in stream:
                yield 0, chunk
        return
    events: asyncio.Queue[Numbered | asyncio.Task[None]] = asyncio.Queue()

    async def read(number: int, request: Request) -> None:
        async with aclosing(_stream(service.lm.engine, request)) as stream:
            async for chunk in stream:
                events.put_nowait((number, chunk))

    readers = [asyncio.create_task(read(n, plan.request)) for n, plan in enumerate(plans)]
    for reader in readers:
        reader.add_done_callback(events.put_nowait)
    try:
        num_done = 0
        while num_done < len(readers):
            event = await events.get()
            if isinstance(event, tuple):
                yield event
            else:
                event.result()
                num_done += 1
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


def _stream(engine: Engine, request: Request) -> AsyncGenerator[Chunk]:
    stream = engine.stream(request)
    assert isinstance(stream, AsyncGenerator), "engines stream with async generators"
    return stream
