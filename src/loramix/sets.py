"""Which adapters lie side by side: a step is given sets that are there, not ones it waits for.

Copying the factors of eight adapters together takes as long as a step. When a request brings an
adapter that the others' set does not have, the step uses that set and, beside it, the adapter by
itself, which is no copy. The new set is laid out a few layers a step, and used once it is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import islice

from loramix.stacked import Siblings

Names = tuple[str, ...]

MOST_SETS = 4  # that are kept, if a step has no more
MOST_SINGLE = 2  # adapters beside a set; each costs a step 5 percent
STEPS = 32  # in which a set is laid out


class Sets:
    """The sets of adapters whose factors the layers of one model keep. Not thread-safe."""

    def __init__(self, groups: Callable[[], Collection[Siblings]]) -> None:
        self._groups = groups  # the model's layers, those of one input together
        self._ready: list[Names] = []  # used last at the end
        self._num_used = 0  # of them, since the last step
        self._coming: Names = ()  # the set that is being laid out, and where it is not yet
        self._left: Iterator[Siblings] = iter(())
        self._num_layers_a_step = 1

    def covering(self, names: Iterable[str], spare: float = 0.5) -> list[Names]:
        """Sets that have these adapters, each adapter in one.

        Reading one that is not needed costs a percent of a step: up to `spare` more than these are
        taken into the bargain. Where that is 0, they are one set, laid out by the step.
        """
        wanted = set(names)
        most = len(wanted) * (1 + spare)
        fit = [found for found in self._ready if wanted <= set(found) and len(found) <= most]
        if fit:
            return self._used([min(fit, key=len)])
        whole = tuple(sorted(wanted))
        near = self._near(wanted) if spare else None
        if near is None:
            return self._used([whole])
        self._begin(whole)
        return self._used([near, *((name,) for name in sorted(wanted.difference(near)))])

    def tidy(self) -> None:
        """Between two steps: go on with the set that is coming, drop all but those used last."""
        num_kept = max(MOST_SETS, self._num_used)
        for old in self._ready[:-num_kept]:
            self._drop(old)
        self._ready, self._num_used = self._ready[-num_kept:], 0
        if self._coming:
            some = list(islice(self._left, self._num_layers_a_step))
            for siblings in some:
                siblings.block(self._coming)
            if len(some) < self._num_layers_a_step:
                self._ready.append(self._coming)
                self._coming = ()

    def forget(self, name: str) -> None:
        """An adapter leaves, and what it is in; the layers have dropped it."""
        self._ready = [names for names in self._ready if name not in names]
        if name in self._coming:
            self._coming = ()

    def _near(self, wanted: set[str]) -> Names | None:
        """A set that has nearly all of these, and not many others."""
        near = [
            found
            for found in self._ready
            if wanted.intersection(found)
            and len(wanted.difference(found)) <= MOST_SINGLE
            and len(set(found) - wanted) <= len(wanted)
        ]
        return max(near, key=lambda found: len(wanted.intersection(found)), default=None)

    def _begin(self, names: Names) -> None:
        """Lay this set out from now on, and no other."""
        if names != self._coming:
            self._drop(self._coming)
            groups = self._groups()
            self._coming, self._left = names, iter(groups)
            self._num_layers_a_step = -(-len(groups) // STEPS)

    def _drop(self, names: Names) -> None:
        for siblings in self._groups():
            siblings.drop(names)

    def _used(self, sets: list[Names]) -> list[Names]:
        self._ready = [*(found for found in self._ready if found not in sets), *sets]
        self._num_used += len(sets)
        return sets
