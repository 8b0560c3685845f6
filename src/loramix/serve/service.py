"""What every route works with, handed to the app once: no route reads a global."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from loramix.lm import LM
from loramix.serve.limits import Limits


@dataclass(frozen=True, slots=True)
class Service:
    """A model, where its conversations and keys are kept, and how it is to be served.

    A module of `serve` has `router = APIRouter()`; its handlers take `service: Serving`.
    """

    lm: LM
    store: None = None  # a loramix.store.Store
    settings: None = None  # a loramix.serve.settings.Settings
    limits: Limits = Limits()


async def _of_app(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Serving = Annotated[Service, Depends(_of_app)]
