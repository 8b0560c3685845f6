"""Every error this program raises on purpose.

* LoramixError                 anything a user or a client can act on
  * MixError               a mix that cannot be read or applied
    - MixSyntaxError         "a:0.5++b"
    - UnknownAdapter         a name the library does not hold
  * AdapterError           a file or tensor that does not fit
    - BaseMismatch           trained for another base model
    - FormatError            not a LoRA adapter we can read
  * BaseError              a base model that cannot be opened
  * RouteError             a router that cannot be fitted, loaded or used
  * EngineError            the engine refused or lost a request
    - BadRequest             a request no engine can answer (empty prompt, impossible sampling)
    - TooLong                prompt + max_tokens exceed the context
    - Busy                   the queue is full
  * MergeError             updates, settings or a base that cannot be merged exactly
  * TrainError             training data or settings that cannot work
  * SearchError            rows or settings that no mix can be searched with
  * SettingsError          a file of settings that cannot be honoured
  * StoreError             a database that cannot be opened, read or written
    - NoRecord               it does not hold this, or not for this key
    - Conflict               somebody else was faster
    - Unstorable             a value that no database holds
    - DatabaseFull           there is no room for it
  * ServeError             what a server refuses, or cannot do now
    - TooLarge               a body beyond the limit
    - NotKnown               a key is needed, or the one given opens nothing
    - NotAllowed             another key is needed
    - TooMany                the key's limit for a minute is reached
    - TookTooLong            the time for a request is over
    - TaskCancelled          a workflow's task was cancelled while its output was waited for
    - TaskFailed             what is asked for is the output of a task that failed
    - RouterFailed           the router broke: nothing is answered in its stead
    - Ending                 the server is shutting down
    - StorageFailed          the disk does not take what is to be kept
  * HubError               the hub refused a push, or cannot be reached

A message says what happened, what was expected, and what to do next, in one line. The command
line prints it and exits 1; the server sends it as OpenAI error JSON with `status`. Nothing else
catches LoramixError, but a library that lists the good adapters beside a damaged one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class LoramixError(Exception):
    """Base of all errors raised on purpose."""

    status = 400


class MixError(LoramixError): ...


class MixSyntaxError(MixError): ...


class UnknownAdapter(MixError):
    """A mix names an adapter that the library does not hold."""

    status = 404

    def __init__(self, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(names) or 'none'}."
        super().__init__(f"No adapter {name!r} in the library. {hint}")


class AdapterError(LoramixError): ...


class BaseMismatch(AdapterError): ...


class FormatError(AdapterError): ...


class BaseError(LoramixError): ...


class RouteError(LoramixError): ...


class EngineError(LoramixError):
    status = 500


class BadRequest(EngineError):
    status = 400


class TooLong(EngineError):
    status = 400


class Busy(EngineError):
    """The queue is full: the request was not taken."""

    status = 503


class MergeError(LoramixError): ...


class TrainError(LoramixError): ...


class SearchError(LoramixError): ...


class SettingsError(LoramixError): ...


class StoreError(LoramixError):
    status = 503


class NoRecord(StoreError):
    status = 404


class Conflict(StoreError):
    status = 409


class DatabaseFull(StoreError):
    status = 507


class Unstorable(StoreError):
    """Half a character, a NaN, or for PostgreSQL a NUL."""

    status = 400


class ServeError(LoramixError): ...


class TooLarge(ServeError):
    status = 413


class NotKnown(ServeError):
    status = 401
    headers: Mapping[str, str] = {"www-authenticate": "Bearer"}

    def __init__(self, is_given: bool) -> None:
        problem = "The API key is not known" if is_given else "An API key is needed"
        super().__init__(f"{problem}; send one as 'Authorization: Bearer ...' (`loramix keys`).")


class TooMany(ServeError):
    status = 429

    def __init__(self, limit: str, wait_s: int) -> None:
        super().__init__(f"This key's {limit} in a minute are used up; try again in {wait_s} s.")
        self.headers = {"retry-after": str(wait_s)}


class NotAllowed(ServeError):
    status = 403


class TookTooLong(ServeError):
    status = 504


class TaskCancelled(ServeError):
    status = 409

    def __init__(self, id: str) -> None:
        super().__init__(f"The task {id} was cancelled; run its workflow again.")


class TaskFailed(ServeError):
    status = 500

    def __init__(self, id: str, reason: str) -> None:
        super().__init__(f"The task {id} failed: {reason}")


class RouterFailed(ServeError):
    status = 503


class Ending(ServeError):
    status = 503

    def __init__(self) -> None:
        super().__init__("The server is shutting down; send the request again when it is back.")


class StorageFailed(ServeError):
    status = 507


class HubError(LoramixError):
    """The hub refused a push, or cannot be reached."""

    status = 502
