"""Asking a running server, as a command does: an answer, or the error it sent as one sentence."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loramix.errors import LoramixError, ServeError

if TYPE_CHECKING:
    import httpx2


def ask_server(
    url: str, method: str, path: str, body: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The JSON that a server answers with, asked by $LORAMIX_API_KEY if there is one."""
    import httpx2

    key = os.environ.get("LORAMIX_API_KEY", "")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        address = f"{url.rstrip('/')}{path}"
        return answer(httpx2.request(method, address, json=body, headers=headers, timeout=None))
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise ServeError(f"{url} does not answer: {error}; is the server running?") from error


def answer(response: httpx2.Response) -> dict[str, Any]:
    """What a response says. Raises LoramixError with the server's own words for a failure."""
    try:
        body: dict[str, Any] = response.json()
    except ValueError:
        raise ServeError(f"The server said {response.status_code} without JSON.") from None
    if response.is_error:
        raise LoramixError(body.get("error", {}).get("message", f"Status {response.status_code}."))
    return body
