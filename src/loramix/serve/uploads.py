"""Files that come as a form."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from loramix.errors import AdapterError, BadRequest, StorageFailed


def described(field: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """What the API's description says of a form with this one field."""
    form = {"type": "object", "required": [field], "properties": {field: dict(schema)}}
    content = {"multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "content": content}}


@asynccontextmanager
async def received(request: Request, most: int, expected: str) -> AsyncIterator[list[UploadFile]]:
    """The files of a form, at most so many; BadRequest, with what was `expected`, for no form."""
    try:
        form = await request.form(max_files=most, max_fields=0)
    except HTTPException as error:
        if error.status_code == 413:
            raise
        raise BadRequest(f"The form cannot be read ({error.detail}); {expected}.") from error
    try:
        yield [part for _, part in form.multi_items() if isinstance(part, UploadFile)]
    finally:
        await form.close()


@contextmanager
def stored() -> Iterator[None]:
    """StorageFailed where the disk is at fault, not what was to be written."""
    try:
        yield
    except OSError as error:
        raise StorageFailed(f"The server cannot write this: {error.strerror or error}.") from error
    except AdapterError as error:
        if isinstance(error.__cause__, OSError):
            raise StorageFailed(str(error)) from error
        raise


async def write(part: UploadFile, place: Path) -> None:
    with place.open("wb") as file:
        await asyncio.to_thread(shutil.copyfileobj, part.file, file)
