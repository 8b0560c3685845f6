"""Asks a model behind any server of OpenAI's chat API, patiently."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loramix.errors import BadRequest, TrainError

if TYPE_CHECKING:
    import httpx2

ATTEMPTS = 6  # of one request, while the server is busy, broken or silent
WAIT_S = 1.0  # before the second attempt, doubled each time; or what Retry-After says
LONGEST_WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A model by its address (`http://host:8000/v1`); $OPENAI_API_KEY is sent if there is one."""

    url: str
    model: str | None = None  # None: the server's own choice
    max_tokens: int = 1024
    timeout_s: float = 120.0
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise BadRequest(f"{self.url[:80]!r} is no address; expected http://HOST:PORT/v1.")

    def __call__(self, prompt: str, seed: int) -> str:
        """What the model says. TrainError if it cannot be had; "" if the response has no text."""
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0.9,
            "max_tokens": self.max_tokens,
            "seed": seed,
        }
        response = self._asked(body if self.model is None else {**body, "model": self.model})
        try:
            return str(response.json()["choices"][0]["message"]["content"] or "")
        except (ValueError, LookupError, TypeError):
            return ""

    def _asked(self, body: dict[str, Any]) -> httpx2.Response:
        import httpx2

        key = os.environ.get("OPENAI_API_KEY")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        address = f"{self.url.rstrip('/')}/chat/completions"
        for attempt in range(ATTEMPTS):
            wait_s = WAIT_S * 2**attempt
            try:
                got = httpx2.post(address, json=body, headers=headers, timeout=self.timeout_s)
            except httpx2.HTTPError as error:
                problem = str(error) or type(error).__name__
            else:
                if got.is_success:
                    return got
                problem = f"{got.status_code}: {got.text.strip()[:200]}"
                if got.status_code != 429 and got.status_code < 500:
                    break
                wait_s = _retry_after(got.headers.get("retry-after", ""), wait_s)
            if attempt < ATTEMPTS - 1:
                self.sleep(min(wait_s, LONGEST_WAIT_S))
        raise TrainError(f"{address} does not answer: {problem}; the same command goes on later.")


def _retry_after(said: str, otherwise: float) -> float:
    return float(said) if said.isascii() and said.isdigit() else otherwise
