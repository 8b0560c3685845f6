"""The router that learns from the experts' own rows: a softmax gate, an abstain score, neighbours.

    text --> n-grams ---------> log-probs --+
       |                                    +--> calibrated log-probs --> scores --> mix
       +---> sentence vector -> log-probs --+             |
       |                                                  v
       +---> nearest stored examples -------------->  in scope?  --no--> base

The gate's classes are the adapters and one more, the background: generic queries that belong to
nobody. Both of its halves are multinomial logistic regressions with balanced classes; their
log-probabilities are averaged with a weight, and sharpened by a temperature, that held-out rows
choose. Fitting takes seconds; deciding takes a few look-ups in plain arrays.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import cast

import numpy as np

from loramix.adapter import Card
from loramix.chat import Message
from loramix.errors import RouteError
from loramix.mix import Mix
from loramix.route import Decision, to_mix
from loramix.route.abstain import (
    Abstain,
    Evidence,
    background,
)
from loramix.route.blend import Gate, compare, look
from loramix.route.calibration import require_known, share_of
from loramix.route.encode import Encoder, TokenEncoder, Tokens, default_encoder
from loramix.route.halves import Halves, cut
from loramix.route.learn import calibrate, fit_gate, store
from loramix.route.neighbours import Neighbours
from loramix.route.newcomer import FALSE, card_texts, joined, parted
from loramix.route.ngrams import Floats, NgramEncoder, words
from loramix.route.reasons import information, least_of, nearest, said, seam, strongest, verdict
from loramix.route.rows import Batch, Rows, collect, read
from loramix.route.softmax import log_softmax
from loramix.route.turns import follow, user_turns

COLD = 20  # an adapter with fewer examples is marked cold; `suggest` asks for as many
MIX_TEMPERATURE = 0.5  # a second adapter joins when its probability is near the first's


@dataclass(frozen=True, eq=False)
class GateRouter:
    """Routes a conversation by its last user turn; it never changes, `add` gives a new router.

    A turn too short to stand alone follows the one before it (turns.py).
    """

    adapters: tuple[str, ...]  # sorted
    examples: Mapping[str, tuple[str, ...]]  # all it was fitted from; the background under ""
    vectors: Floats | None  # [N, D] of the examples, in their order, if there is an encoder
    gate: Gate
    neighbours: Neighbours
    abstain: Abstain
    ngrams: NgramEncoder
    encoder: Encoder | None  # None: n-grams alone
    top: int = 2  # most adapters in one mix
    fades: bool = False  # weights sum to 1 - P(none), but where each half has an adapter of its own
    cards: frozenset[str] = frozenset()  # adapters known by their cards alone
    fresh: frozenset[str] = frozenset()  # those that joined since all were learned together

    @classmethod
    def fit(
        cls,
        examples: Mapping[str, Sequence[str]],
        *,
        encoder: Encoder | None = None,
        keep: float = 0.95,
        top: int = 2,
        foreign: Sequence[str] | None = None,
        cards: Sequence[Card] = (),
    ) -> GateRouter:
        """Learn from queries of each adapter; the same input gives the same router.

        `encoder` defaults to the sentence encoder when its package is installed; NgramEncoder()
        means n-grams alone. `keep` is the share of an adapter's own queries that must not fall to
        the base. `foreign` replaces the packaged queries that belong to no adapter. `cards` are of
        adapters that start cold: those among them that have no examples.
        """
        chosen = default_encoder() if encoder is None else encoder
        ngrams = chosen if isinstance(chosen, NgramEncoder) else NgramEncoder()
        sentence = None if isinstance(chosen, NgramEncoder) else chosen
        cold = [card for card in cards if card.name not in examples]
        own = examples or {card.name: card_texts(card) for card in cold}
        rows = collect(own, background() if foreign is None else foreign, ngrams, sentence)
        router = cls._fitted(rows, ngrams, sentence, keep, top)
        if not examples:
            return replace(router, cards=frozenset(own))
        return reduce(GateRouter.introduce, cold, router)

    @classmethod
    def _fitted(
        cls, rows: Rows, ngrams: NgramEncoder, encoder: Encoder | None, keep: float, top: int
    ) -> GateRouter:
        share_of("keep", keep)
        if top < 1:
            raise RouteError(f"top is the number of adapters in a mix, at least 1; got {top}.")
        start, abstain = calibrate(rows, keep)
        gate = fit_gate(rows, start)
        return cls(
            adapters=rows.adapters,
            examples=rows.examples(),
            vectors=rows.batch.vectors,
            gate=gate,
            neighbours=store(rows, gate),
            abstain=abstain,
            ngrams=ngrams,
            encoder=encoder,
            top=top,
        )

    @property
    def keep(self) -> float:
        return self.abstain.keep

    def save(self, folder: Path) -> None:
        """Write one directory, aside first: it is complete or not there. Replaces an older one."""
        from loramix.route import saved

        saved.save(self, folder)

    @classmethod
    def load(cls, folder: Path, *, encoder: Encoder | None = None) -> GateRouter:
        """Read what `save` wrote, without encoding anything anew.

        `encoder` saves opening the sentence encoder again. Raises RouteError for a folder that is
        not a router, and for an encoder other than the one it was fitted with.
        """
        from loramix.route import saved

        return saved.load(folder, encoder)

    def add(self, name: str, examples: Sequence[str]) -> GateRouter:
        """A router that also knows this adapter, or knows it anew, at once; see newcomer.py.

        The others' weights stand. It is `fresh` until `refit` learns all of them together.
        """
        if self.adapters == (name,):
            alone = replace(self, cards=frozenset())
            return alone.refitted({name: tuple(examples), "": self.examples[""]})
        rest = parted(self, name) if name in self.adapters else self
        return replace(joined(rest, name, examples), fresh=rest.fresh | {name})

    def introduce(self, card: Card) -> GateRouter:
        """A router that knows an adapter by its card, cold, until `add` brings examples."""
        grown = self.add(card.name, card_texts(card))
        return replace(grown, cards=grown.cards | {card.name}, fresh=grown.fresh - {card.name})

    def meet(self, card: Card, examples: Sequence[str] = ()) -> GateRouter | None:
        """`add` if there are examples, `introduce` if none are known; None if they stay."""
        if examples:
            return self.add(card.name, examples)
        known = card.name in self.adapters and card.name not in self.cards
        return None if known else self.introduce(card)

    def remove(self, name: str) -> GateRouter:
        """A router without this adapter, at once. Raises UnknownAdapter; the last one stays."""
        require_known(self, [name])
        if self.adapters == (name,):
            raise RouteError(f"{name!r} is the router's last adapter; delete the router instead.")
        return parted(self, name)

    def refit(self) -> GateRouter:
        """All adapters learned together from the stored examples."""
        return self.refitted(self.examples)

    def refitted(self, examples: Mapping[str, Sequence[str]]) -> GateRouter:
        """The same settings for other examples; the background, under "", is among them.

        A card's few words would weigh as much as another's thousand rows, so adapters known by
        their cards join afterwards, unless there are no others.
        """
        cold = self.cards & examples.keys()
        known = {name: texts for name, texts in examples.items() if name not in cold}
        rows = self._collected(known if known.keys() > {""} else examples)
        fitted = self._fitted(rows, self.ngrams, self.encoder, self.keep, self.top)
        for name in sorted(cold - {*rows.adapters}):
            fitted = joined(fitted, name, examples[name])
        return replace(fitted, cards=cold, fades=self.fades)

    def rows(self) -> Rows:
        """All it was fitted from, numbered."""
        return self._collected(self.examples)

    def _collected(self, examples: Mapping[str, Sequence[str]]) -> Rows:
        """Examples as rows, without embedding again what is stored."""
        own = {name: texts for name, texts in examples.items() if name}
        known: dict[str, Floats] = {}
        if self.vectors is not None:
            texts = [text for group in self.examples.values() for text in group]
            known = dict(zip(texts, self.vectors, strict=True))
        return collect(own, examples[""], self.ngrams, self.encoder, known)

    def scores(self, queries: Sequence[str]) -> list[list[float]]:
        """Probability of each adapter for each query; what is missing to one is none's."""
        if not len(queries):
            return []
        batch = read(queries, self.ngrams, self.encoder)
        rows = self._probabilities(look(batch, self.gate, self.neighbours))[:, :-1]
        return cast(list[list[float]], rows.tolist())

    def route(self, messages: Sequence[Message]) -> Decision:
        """The mix of the last user turn; the empty one when no adapter fits. Raises RouteError."""
        started = time.perf_counter()
        decision = follow(self.decide, self.information, user_turns(messages))
        return replace(decision, latency_ms=(time.perf_counter() - started) * 1e3)

    def information(self, text: str) -> float:
        """How much a text says by itself, in nats."""
        return information(self.gate, self.ngrams, text)

    def decide(self, query: str) -> Decision:
        """The decision on one text, whatever came before it."""
        if not words(query):
            scores = dict.fromkeys(self.adapters, 0.0)
            return Decision(Mix(), scores, 1.0, ("base: the query has no words to route on",), 0.0)
        return self.decided(query, *self.read(query))

    def decided(self, query: str, batch: Batch, tokens: Tokens | None) -> Decision:
        """The decision on a text with words, as it was read."""
        started = time.perf_counter()
        evidence, cosines = compare(batch, self.gate, self.neighbours)
        log_probs = evidence.log_probs[0, :-1]
        winner = int(log_probs.argmax())
        score, threshold = float(self.abstain.scores(evidence)[0]), self.abstain.thresholds[winner]
        fits = score >= threshold
        probabilities = self._probabilities(evidence)[0]
        near = nearest(self.neighbours, self.adapters, cosines[0])
        strong = strongest(self.gate, self.ngrams, query, winner)
        name = self.adapters[winner]
        mix, why = Mix(), verdict(name, score, threshold, self._target(name))
        if two := self._two(query, evidence.log_probs[0], tokens):
            mix, why = two
        elif fits:
            scores = log_probs.tolist()
            strength = float(1 - probabilities[-1]) if self.fades else 1.0
            mix = to_mix(
                scores, self.adapters, top=self.top, temperature=MIX_TEMPERATURE, strength=strength
            )
        return Decision(
            mix=mix,
            scores=dict(zip(self.adapters, probabilities[:-1].tolist(), strict=True)),
            none=float(probabilities[-1]),
            reasons=(why, *said(name, near, strong), *self._cold(name)),
            latency_ms=(time.perf_counter() - started) * 1e3,
            nearest=near,
            words=strong,
            coldness=self.coldness(name),
        )

    def coldness(self, adapter: str) -> float:
        """0 from COLD examples of an adapter on; 1 if it is known by its card alone."""
        if adapter in self.cards:
            return 1.0
        return max(0.0, 1 - len(self.examples[adapter]) / COLD)

    def _cold(self, name: str) -> list[str]:
        """That an adapter is cold, and why."""
        known = "its card" if name in self.cards else f"{len(self.examples[name])} examples"
        return [f"cold: {name} is known by {known} only"] if self.coldness(name) else []

    def _target(self, name: str) -> str:
        """What an adapter's threshold stands for."""
        if self.coldness(name) and name in self.cards | self.fresh:
            return f"which {FALSE:.0%} of foreign queries reach at most"
        return least_of(name, self.keep)

    def read(self, query: str) -> tuple[Batch, Tokens | None]:
        """One query, and its tokens if they serve to look for two skills in it."""
        if self.top == 1 or not isinstance(self.encoder, TokenEncoder):
            return read([query], self.ngrams, self.encoder), None
        tokens = self.encoder.tokens(query)
        return Batch(self.ngrams.matrix([query]), tokens.vector), tokens

    def halves(self, query: str, log_probs: Floats, tokens: Tokens | None = None) -> Halves | None:
        """Where the query is best cut in two; `log_probs` are those of it as one text, [K + 1].

        None without a sentence encoder: the threshold was set and measured with one.
        """
        if self.encoder is None:
            return None
        return cut(query, log_probs, self.gate, self.ngrams, self.encoder, tokens)

    def _two(self, query: str, log_probs: Floats, tokens: Tokens | None) -> tuple[Mix, str] | None:
        """The mix of a query with two skills, and why.

        Each half alone must be in scope; the whole, torn between two adapters, often is not.
        """
        halves = self.halves(query, log_probs, tokens) if self.top > 1 else None
        if halves is None or not halves.two:
            return None
        if not halves.sketched and not self._in_scope(halves):
            return None
        names = [self.adapters[i] for i in halves.adapters]
        mix = to_mix(halves.log_probs, names, top=self.top, temperature=MIX_TEMPERATURE)
        return mix, seam(names, halves.parts)

    def _in_scope(self, halves: Halves) -> bool:
        scores = self.abstain.scores(look(halves.batch, self.gate, self.neighbours))
        return all(scores >= [self.abstain.thresholds[i] for i in halves.adapters])

    def _probabilities(self, evidence: Evidence) -> Floats:
        """[N, K + 1]: of each adapter, and last of none; they sum to one."""
        none = 1 / (1 + np.exp(self.abstain.scores(evidence).clip(-30, 30)))
        adapters = np.exp(log_softmax(evidence.log_probs[:, :-1])) * (1 - none[:, None])
        return np.concatenate([adapters, none[:, None]], axis=1)
