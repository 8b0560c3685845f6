"""Settings files laid over one another, with `${env.NAME | default}` and `a.b=c` filled in.

What is read is plain data; where each value stands is remembered, so that an error can say it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from loramix.errors import SettingsError

Place = tuple[str | int, ...]  # ("adapters", 0, "name")
_VARIABLE = re.compile(r"\$\{\s*env\.(\w+)\s*(?:\|\s*(.*?)\s*)?\}")
_LIKE_VARIABLE = re.compile(r"\$\{[^}]*\}?")


@dataclass(slots=True)
class Overlays:
    """The data of all files so far, and the file and line of each value."""

    data: dict[str, Any] = field(default_factory=dict)
    places: dict[Place, str] = field(default_factory=dict)

    def lay(self, path: Path, env: Mapping[str, str] = os.environ) -> None:
        """Lay a file over what is there: mappings merge, anything else is replaced.

        Raises SettingsError for a file that is missing, is not YAML, names a key twice, or needs a
        variable that is not set.
        """
        try:
            root = yaml.compose(path.read_text("utf-8"), Loader=yaml.SafeLoader)
            if root is None:
                return
            if not isinstance(root, yaml.MappingNode):
                raise SettingsError(f"{path} holds no mapping; expected lines like 'base: pocket'.")
            above = _Reader(path, env, self.places).value(root, ())
        except FileNotFoundError:
            raise SettingsError(f"{path} does not exist; expected a file of settings.") from None
        except OSError as error:
            raise SettingsError(f"{path} cannot be read: {error.strerror}.") from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            said = " ".join(str(error).split()) or "it goes round in circles"
            raise SettingsError(f"{path} is not YAML that can be read: {said}.") from error
        self.data = self._merged(self.data, above, ())

    def set(self, assignment: str) -> None:
        """Lay `a.b=c` over what is there; c is read as YAML."""
        name, equals, text = assignment.partition("=")
        parts = name.strip().split(".")
        if not equals or not all(parts):
            raise SettingsError(f"--set {assignment!r} cannot be read; expected a.b=value.")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise SettingsError(f"--set {name}: {text!r} is not YAML.") from error
        for end in range(1, len(parts) + 1):
            self.places[tuple(parts[:end])] = f"--set {name}"
        for part in reversed(parts):
            value = {part: value}
        self.data = self._merged(self.data, value, ())

    def where(self, place: Place) -> str:
        """Where a value, or the nearest one around it, stands."""
        for end in range(len(place), 0, -1):
            if place[:end] in self.places:
                return self.places[place[:end]]
        return "the settings"

    def _merged(self, below: Any, above: Any, place: Place) -> Any:
        if not isinstance(below, dict) or not isinstance(above, dict):
            return above
        merged = dict(below)
        for key, value in above.items():
            merged[key] = self._merged(below.get(key), value, (*place, key))
        return merged


@dataclass(frozen=True, slots=True)
class _Reader:
    """Turns YAML nodes into data."""

    path: Path
    env: Mapping[str, str]
    places: dict[Place, str]

    def value(self, node: yaml.Node, place: Place) -> Any:
        self.places[place] = f"{self.path}:{node.start_mark.line + 1}"
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, place)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(child, (*place, n)) for n, child in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        filled = self._filled(node, place)
        if filled == node.value:
            return _plain(node)
        # A variable's value means what one plain word of YAML means: a port is a number. It is a
        # word and not a document, whatever characters are in it; in quotes it is always a text.
        resolver: Any = yaml.SafeLoader("")
        tag = resolver.resolve(yaml.ScalarNode, filled, (node.style is None, False))
        return _plain(yaml.ScalarNode(tag, filled, node.start_mark, node.end_mark, node.style))

    def _mapping(self, node: yaml.MappingNode, place: Place) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, child in node.value:
            name = str(_plain(key))
            if name in found:
                line = f"{self.path}:{key.start_mark.line + 1}"
                raise SettingsError(f"{line}: {name!r} is there twice; keep one of them.")
            found[name] = self.value(child, (*place, name))
            self.places[(*place, name)] = f"{self.path}:{key.start_mark.line + 1}"
        return found

    def _filled(self, node: yaml.ScalarNode, place: Place) -> str:
        def fill(match: re.Match[str]) -> str:
            name, default = match.groups()
            if name in self.env:
                return self.env[name]
            if default is None:
                raise SettingsError(
                    f"{self.places[place]}: the environment variable {name} is not set; set it, or "
                    f"write ${{env.{name} | default}}."
                )
            return str(default)

        text: str = node.value
        rest = _VARIABLE.sub("", text)
        if wrong := _LIKE_VARIABLE.search(rest):
            raise SettingsError(
                f"{self.places[place]}: {wrong[0]!r} is no variable; expected ${{env.NAME}} or "
                f"${{env.NAME | default}}."
            )
        return _VARIABLE.sub(fill, text)


def _plain(node: yaml.Node) -> Any:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node, deep=True)
    finally:
        loader.dispose()


def read(files: Sequence[Path], assignments: Sequence[str] = ()) -> Overlays:
    """All files in order, then all assignments."""
    overlays = Overlays()
    for file in files:
        overlays.lay(file)
    for assignment in assignments:
        overlays.set(assignment)
    return overlays
