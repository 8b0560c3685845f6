"""Adapters come and go while the server runs: llama.cpp's way, vLLM's, and by upload.

Everything here is for admins. Paths are read inside the configured roots only; uploads are files of
known names. An adapter is tried in the engine before it gets its name, so what is served stays
served if the new one is no good.
"""

from __future__ import annotations

import asyncio
import dataclasses
import tempfile
from pathlib import Path
from secrets import token_hex
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field

from loramix.adapter import Card
from loramix.engine import Request as Question
from loramix.engine import Sampling
from loramix.errors import BadRequest
from loramix.formats.card import write_card
from loramix.formats.folder import CARD, CONFIG, SAFE
from loramix.mix import Mix, check_name
from loramix.route.rows import read_queries
from loramix.serve import uploads
from loramix.serve.answering import check_system
from loramix.serve.failures import Plain, body
from loramix.serve.naming import scaled
from loramix.serve.roots import inside
from loramix.serve.service import ADMIN, Asking, Service, Serving
from loramix.serve.wire import LoraScale, Text, Wire

router = APIRouter(tags=["Adapters"], dependencies=ADMIN)
QUERIES = "examples.jsonl"  # that its router learns: {"text": "..."} a line
FILES = (CONFIG, CARD, *SAFE, QUERIES)
TEXT: dict[str, Any] = {"content": {"text/plain": {"schema": {"type": "string"}}}}


class LlamaAdapter(BaseModel):
    """As llama.cpp lists them; `path` is the name, as places on the server are its own."""

    id: int
    name: str
    path: str
    scale: float
    task_name: str = ""
    prompt_prefix: str = ""


@router.get("/lora-adapters")
async def list_scales(service: Serving) -> list[LlamaAdapter]:
    """The weights that requests get which name no mix: zeros while the router chooses."""
    default = service.default_mix
    weights = Mix() if default == "auto" else Mix.parse(default)
    return [
        LlamaAdapter(id=number, name=name, path=name, scale=weights.get(name, 0.0))
        for number, name in service.numbers().items()
    ]


@router.post("/lora-adapters")
async def set_scales(scales: list[LoraScale], service: Serving, caller: Asking) -> dict[str, bool]:
    """Set the mix of requests that name none; adapters that are not listed get zero."""
    mix = scaled(scales, service)
    caller.require(mix, service)
    service.live.default = str(mix)
    return {"success": True}


class LoadAsked(Wire):
    lora_name: str = ""
    lora_path: str = ""
    load_inplace: bool = False
    is_3d_lora_weight: bool | None = None  # of fused experts, whose form is read from the file


class UnloadAsked(Wire):
    lora_name: str = ""
    lora_int_id: int | None = None  # vLLM's own number, which names say better


@router.post("/v1/load_lora_adapter", responses={200: TEXT})
async def load(asked: LoadAsked, service: Serving) -> Response:
    """vLLM's: take in an adapter from a folder inside the configured roots."""
    name = asked.lora_name
    if not name or not asked.lora_path:
        return _vllm(400, "Both 'lora_name' and 'lora_path' must be provided.")
    if not asked.load_inplace and name in service.names():
        return _vllm(
            400,
            f"The lora adapter '{name}' has already been loaded. If you want to load the adapter "
            f"in place, set 'load_inplace' to True.",
        )
    replace = asked.load_inplace or name in service.live.hidden
    folder = inside(asked.lora_path, service.roots, "lora_path")
    await _take_in(service, folder, name, replace=replace)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post("/v1/unload_lora_adapter", responses={200: TEXT})
async def unload(asked: UnloadAsked, service: Serving) -> Response:
    """vLLM's: offer an adapter no more. Its files stay, and it is back after a restart."""
    name = asked.lora_name
    if not name:
        return _vllm(400, "'lora_name' needs to be provided to unload a LoRA adapter.")
    if name not in service.names():
        return _vllm(404, f"The lora adapter '{name}' cannot be found.")
    service.live.hidden.add(name)
    service.lm.engine.forget(name)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


class CardBody(BaseModel):
    """An adapter's card, and whether it is in memory."""

    name: str
    description: str
    skills: list[str]
    examples: list[str]
    weight: float
    base: str
    base_fingerprint: str
    licence: str
    scores: dict[str, float]
    system_prompt: str
    in_memory: bool


class AdapterList(BaseModel):
    data: list[CardBody]
    damaged: dict[str, str]


class CardPatch(Wire):
    description: Text | None = None
    skills: list[Text] | None = None
    examples: list[Text] | None = None
    weight: float | None = Field(None, allow_inf_nan=False)
    licence: Text | None = None
    system_prompt: Text | None = Field(None, description='Of chats that bring none; "" is none.')


@router.get("/v1/adapters")
async def list_cards(service: Serving) -> AdapterList:
    """All that are whole, and what is wrong with the rest."""
    library = service.lm.library
    cards, damaged = await asyncio.to_thread(lambda: (library.cards(), library.damaged()))
    return AdapterList(data=[_body(card, service) for card in cards], damaged=damaged)


@router.get("/v1/adapters/{name}")
async def show(name: str, service: Serving) -> CardBody:
    return _body(service.lm.library.card(name), service)


@router.patch("/v1/adapters/{name}")
async def change(name: str, patch: CardPatch, service: Serving) -> CardBody:
    """Change what the card says; the fields that are not sent stay."""
    library = service.lm.library
    said = patch.model_dump(exclude_none=True)
    if not said:
        raise BadRequest("The patch says nothing; send the fields of the card that change.")
    if patch.system_prompt is not None:
        if name in service.system_prompts:
            raise BadRequest(f"The settings say the system_prompt of {name!r}; change it there.")
        check_system(patch.system_prompt)
    lists = {key: tuple(value) for key, value in said.items() if isinstance(value, list)}
    card = dataclasses.replace(library.card(name), **(said | lists))
    with uploads.stored():
        write_card(card, library.path(name))
        await asyncio.to_thread(service.learn, card, ())
    return _body(card, service)


@router.delete("/v1/adapters/{name}")
async def delete(name: str, service: Serving) -> dict[str, str]:
    """Delete an adapter's files. Answers that use it go on; nobody can ask for it any more."""
    with uploads.stored():
        await asyncio.to_thread(service.lm.library.remove, name)
        await asyncio.to_thread(service.unlearn, name)
    service.lm.engine.forget(name)
    return {"deleted": name}


_FILES = {"type": "array", "items": {"type": "string", "format": "binary"}}


@router.post("/v1/adapters/{name}/files", openapi_extra=uploads.described("files", _FILES))
async def upload(name: str, request: Request, service: Serving, replace: bool = False) -> CardBody:
    """Take in an adapter from the files of its folder: PEFT's or MLX's, with a card or without.

    The router knows it at once: by its card, or by the queries of an `examples.jsonl`, with lines
    like {"text": "..."}, which it learns together with all others in the background.
    """
    check_name(name)
    if name in service.lm.library.names() and not replace:
        raise BadRequest(f"There is an adapter {name!r} already; ask for replace=true, or rename.")
    with uploads.stored(), tempfile.TemporaryDirectory(prefix="loramix-") as folder:
        await _receive(request, Path(folder))
        await _take_in(service, Path(folder), name, replace=replace)
    return _body(service.lm.library.card(name), service)


async def _receive(request: Request, folder: Path) -> None:
    """Write the files of a form into a folder; BadRequest for any that it should not hold."""
    async with uploads.received(request, len(FILES), "send files only") as parts:
        names = [part.filename for part in parts]
        if not names or len(set(names)) < len(names) or not set(names) <= set(FILES):
            raise BadRequest(
                f"The upload holds {', '.join(repr(n) for n in names)[:200] or 'no files'}; "
                f"expected some of {', '.join(FILES)}, each once."
            )
        for part in parts:
            await uploads.write(part, folder / str(part.filename))


async def _take_in(service: Service, folder: Path, name: str, *, replace: bool) -> None:
    """Add an adapter to the library once the engine has answered with it, or leave all as it was.

    It is tried in memory, under a name that nobody can ask for.
    """
    check_name(name)
    library, engine = service.lm.library, service.lm.engine
    queries = read_queries(folder / QUERIES) if (folder / QUERIES).is_file() else []
    trial = f"trial-{token_hex(6)}"

    def take_in() -> None:
        adapter = library.read(folder, name=trial)
        token = Question((0,), Mix({trial: 1}), Sampling(temperature=0, max_tokens=1))
        try:
            engine.add(adapter)
            engine.generate([token])
        finally:
            engine.forget(trial)
        card = dataclasses.replace(adapter.card, name=name)
        library.put(dataclasses.replace(adapter, name=name, card=card), replace=replace)

    with uploads.stored():
        await asyncio.to_thread(take_in)
    service.live.hidden.discard(name)
    engine.forget(name)
    with uploads.stored():
        await asyncio.to_thread(service.learn, library.card(name), queries)


def _body(card: Card, service: Service) -> CardBody:
    said = service.system_prompts.get(card.name, card.system_prompt)
    more = {
        "system_prompt": said,
        "in_memory": card.name in service.lm.engine.statistics().adapters,
    }
    return CardBody.model_validate(dataclasses.asdict(card) | more)


def _vllm(status: int, message: str) -> Response:
    """An error with the type that vLLM gives it."""
    content = body(status, message)
    content["error"]["type"] = "NotFoundError" if status == 404 else "InvalidUserInput"
    return Plain(content, status)
