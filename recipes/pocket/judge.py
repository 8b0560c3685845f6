"""How good the experts are: exact matches of generated answers on rows nobody learned from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from loramix.chat import Example, Message
from loramix.engine import Request, Sampling
from loramix.engine.local import LocalEngine
from loramix.mix import Mix
from recipes.pocket.tasks import Task, shape

MAX_TOKENS = {"support": 24, "banking": 32, "sentiment": 8, "sql": 480, "math": 48}
CLASSES = 100  # answers that the TF-IDF baseline chooses among


@dataclass(frozen=True, slots=True)
class Score:
    """Exact matches among n answers."""

    hits: int
    n: int

    @property
    def percent(self) -> float:
        return 100 * self.hits / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval in percent (Wilson 1927)."""
        z, p, n = 1.96, self.hits / self.n, self.n
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return 100 * (centre - half), 100 * (centre + half)


def answers(
    engine: LocalEngine, task: str, queries: Sequence[str], mixes: Sequence[Mix]
) -> list[str]:
    """Greedy answers, all in one running batch."""
    sampling = Sampling(temperature=0, max_tokens=MAX_TOKENS[task])
    requests = [
        Request((Message("user", query),), mix, sampling)
        for query, mix in zip(queries, mixes, strict=True)
    ]
    return [answer.text.strip() for answer in engine.generate(requests)]


def count(found: Sequence[str], examples: Sequence[Example]) -> Score:
    pairs = zip(found, examples, strict=True)
    return Score(sum(text == example.answer for text, example in pairs), len(examples))


def unseen(task: Task) -> list[bool]:
    """Which held-out rows ask what no training row asks, digits and case aside. [n]"""
    seen = {shape(example.query) for example in task.train}
    return [shape(example.query) not in seen for example in task.heldout]


def tfidf_score(task: Task) -> Score:
    """TF-IDF of words and word pairs with logistic regression over the `CLASSES` commonest answers.

    It cannot write: where answers are equations or SQL it can only repeat one.
    """
    common = Counter(e.answer for e in task.train).most_common(CLASSES)
    classes = {answer for answer, _ in common}
    learned = [e for e in task.train if e.answer in classes]
    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    x = vectors.fit_transform([e.query for e in learned])
    model = LogisticRegression(C=10, max_iter=300).fit(x, [e.answer for e in learned])
    predicted = model.predict(vectors.transform([e.query for e in task.heldout]))
    return count([str(p) for p in predicted], task.heldout)
