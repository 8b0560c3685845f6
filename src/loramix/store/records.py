"""What the database holds, as values. Times are seconds since 1970; ids are ours, never guessed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["user", "admin"]
Status = Literal["pending", "processing", "completed", "failed", "cancelled"]
State = Literal["queued", "running", "done", "failed", "stopped"]


@dataclass(frozen=True, slots=True)
class Key:
    """Who may ask, and for what. Of its secret only a hash is kept."""

    id: str
    name: str
    role: Role
    adapters: tuple[str, ...] | None  # that it may use; None is all
    requests_per_minute: int | None
    tokens_per_minute: int | None
    created: float


@dataclass(frozen=True, slots=True)
class Turn:
    """A message of a conversation; for an answer also what made it.

    An answer that was given again has a higher `version`; the highest one is the conversation's.
    """

    role: Literal["user", "assistant"]
    content: str
    number: int = 0  # its place
    version: int = 0
    mix: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)  # the router's; empty if not asked
    none: float | None = None
    reasons: tuple[str, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    ms: float = 0.0  # from the request's arrival to the last token
    finish: str = ""  # "stop", "length", or "cancelled" where its reader stopped it
    trace: str = ""
    created: float = 0.0


@dataclass(frozen=True, slots=True)
class Conversation:
    """A title, a system prompt and turns; `turns` is empty in lists."""

    id: str
    owner: str  # the key's id; "" without keys
    title: str
    system: str
    created: float
    changed: float
    turns: tuple[Turn, ...] = ()

    @property
    def current(self) -> tuple[Turn, ...]:
        """The turns that are the conversation: of each number the highest version."""
        return tuple({turn.number: turn for turn in self.turns}.values())


@dataclass(frozen=True, slots=True)
class Task:
    """One run of a workflow."""

    id: str
    owner: str
    workflow: str
    status: Status
    input: Mapping[str, Any]
    output: Any
    error: str
    session: str
    metadata: Mapping[str, Any]
    created: float
    ended: float | None

    @property
    def is_over(self) -> bool:
        return self.status in ("completed", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class Job:
    """Work of hours in a process of its own, as training."""

    id: str
    kind: str
    name: str
    state: State
    settings: Mapping[str, Any]
    folder: str
    pid: int | None
    created: float
    started: float | None
    ended: float | None
    error: str
