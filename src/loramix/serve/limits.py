"""What one client may ask of the server."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes and times beyond which a request is refused, each with a status that says so.

    How many requests may wait is the engine's `max_queue`; rates are limited by key.
    """

    body_bytes: int = 8 * MIB  # of any request but an upload; 413 beyond
    upload_bytes: int = 2048 * MIB  # of an adapter's files together; 413 beyond
    dataset_bytes: int = 256 * MIB  # of a file of rows; 413 beyond
    dataset_rows: int = 500_000  # in it; 400 beyond
    answer_tokens: int = 1024  # of an answer whose length the client leaves open
    n: int = 16  # answers to one request, over all its prompts; 400 beyond
    timeout_s: float = 600.0  # from a request's arrival to its last token; 504 beyond
    task_days: float = 30.0  # that a workflow's task which is over can be asked for
    shutdown_s: float = 10.0  # how long answers under way may go on once the server shall end
