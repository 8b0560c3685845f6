"""The typed fields of a JSON object that a person or another program wrote."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from loramix.errors import FormatError


@dataclass(frozen=True, slots=True)
class Fields:
    """A field as one type; null or absent is the default. Every method raises FormatError."""

    values: Mapping[str, Any]
    where: str

    def text(self, key: str) -> str:
        value = self._get(key, "")
        return value if isinstance(value, str) else self._bad(key, "text")

    def flag(self, key: str) -> bool:
        value = self._get(key, False)
        return value if isinstance(value, bool) else self._bad(key, "true or false")

    def count(self, key: str, default: int) -> int:
        return self._count(key, self._get(key, default))

    def number(self, key: str, default: float) -> float:
        return self._number(key, self._get(key, default))

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts; a single one counts as a list of one."""
        value = self._get(key, [])
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            self._bad(key, "a list of texts")
        return tuple(value)

    def texts_or_text(self, key: str) -> tuple[str, ...] | str | None:
        value = self._get(key, None)
        return value if value is None or isinstance(value, str) else self.texts(key)

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers; a single one counts as a list of one."""
        value = self._get(key, [])
        value = [value] if isinstance(value, int) else value
        if not isinstance(value, list) or not all(type(number) is int for number in value):
            self._bad(key, "a list of whole numbers")
        return tuple(value)

    def flags(self, key: str) -> tuple[bool, ...]:
        value = self._get(key, [])
        if not isinstance(value, list) or not all(isinstance(flag, bool) for flag in value):
            self._bad(key, "a list of true and false")
        return tuple(value)

    def counts(self, key: str) -> dict[str, int]:
        return {name: self._count(key, value) for name, value in self._object(key).items()}

    def numbers(self, key: str) -> dict[str, float]:
        return {name: self._number(key, value) for name, value in self._object(key).items()}

    def compile(self, regexes: Iterable[str]) -> None:
        """FormatError for the first that is no regular expression."""
        for regex in regexes:
            try:
                re.compile(regex)
            except re.error as error:
                message = f"{self.where}: {regex!r} is not a regular expression ({error})"
                raise FormatError(f"{message}; fetch the file again.") from error

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def _object(self, key: str) -> Mapping[str, Any]:
        value = self._get(key, {})
        return value if isinstance(value, Mapping) else self._bad(key, "an object")

    def _count(self, key: str, value: Any) -> int:
        return value if type(value) is int and value > 0 else self._bad(key, "a number from 1 up")

    def _number(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            self._bad(key, "a number")
        if isinstance(value, int) and abs(value) > sys.float_info.max:
            self._bad(key, "a number that a float can hold")
        return float(value) if math.isfinite(value) else self._bad(key, "a finite number")

    def _bad(self, key: str, expected: str) -> NoReturn:
        shown = repr(self.values.get(key))[:60]
        raise FormatError(f"{self.where}: {key} is {shown}; expected {expected}.")
