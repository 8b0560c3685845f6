"""A server with a store of its own, and clients with keys."""

from __future__ import annotations

import httpx

from tests.serve.front import Front


def client(front: Front, secret: str = "") -> httpx.Client:
    headers = {"authorization": f"Bearer {secret}"} if secret else {}
    return httpx.Client(base_url=front.url, headers=headers, timeout=60)
