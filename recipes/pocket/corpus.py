"""What the base reads: public-domain English, and the raw text of the tasks' training rows.

No held-out row is in it, from whichever source it comes. Labels are not in it either: questions
stand alone, SQL stands alone.
Two kinds of documents teach what plain text does not: a page of a book as a chat turn answered by
the next page (so the base knows its chat template), and sentences said twice (so it can copy).
"""

from __future__ import annotations

import gzip
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from recipes.pocket.tasks import TASKS, load, plain, rows

BOOK_PAGE = 1600  # characters of a document cut from a book
BOOK_SHARE = 0.3  # of the pages, so that two cores read everything within the hour
FILM_COPIES = 3  # polarity hangs on words that books do not use
SKIPPED = ("jacob-grimm", "herman-melville", "charles-darwin")  # the most archaic of the books


def documents(data: Path, seed: int = 0) -> list[str]:
    """All documents, repeated as often as they are worth, shuffled. Chat marks are literal text."""
    rng = random.Random(seed)
    pages = [page for text in _books(data) for page in _pages(text)]
    pages = rng.sample(pages, int(BOOK_SHARE * len(pages)))
    docs = [_book_document(page, rng) for page in pages]
    film = [*_groups(_film(data), 8, rng), *_reviews(data)]
    docs += FILM_COPIES * film
    docs += 2 * _groups(_questions(data), 10, rng)
    docs += _worked(data)
    docs += _groups(_sql_text(data), 3, rng)
    docs += [f"{r['question']}\n{r['sql']}" for r in rows(data / "text2sql/wikisql_6k.jsonl.gz")]
    docs += _said_twice([*_film(data), *_questions(data), *_sentences(pages)], 4000, rng)
    rng.shuffle(docs)
    require_unseen(docs, [e.query for name in TASKS for e in load(name, data).heldout])
    return docs


def require_unseen(docs: Iterable[str], heldout: Iterable[str]) -> None:
    """AssertionError if a held-out query is a line of a document, case and punctuation aside."""
    lines = {plain(line) for doc in docs for line in doc.split("\n")}
    found = [query for query in heldout if plain(query) in lines]
    assert not found, f"{len(found)} held-out queries are in the corpus (first: {found[0]!r})"


def _books(data: Path) -> Iterator[str]:
    for path in sorted((data / "text/standardebooks").glob("*.txt.gz")):
        if not path.name.startswith(SKIPPED):
            yield _text(path)
    for name in ("state_union", "inaugural"):
        yield _text(data / f"text/{name}.txt.gz")


def _text(path: Path) -> str:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return file.read()


def _pages(text: str) -> Iterator[str]:
    page = ""
    for paragraph in text.split("\n"):
        page += paragraph.strip() + "\n"
        if len(page) > BOOK_PAGE:
            yield page.strip()
            page = ""


def _book_document(page: str, rng: random.Random) -> str:
    """Every fifth page becomes a short chat: a paragraph, answered by the one that follows."""
    paragraphs = [p for p in page.split("\n") if len(p) > 20]
    if rng.random() > 0.2 or len(paragraphs) < 2:
        return page
    turns = paragraphs[: 2 * (len(paragraphs) // 2)][:6]
    marks = ("<|user|>", "<|assistant|>")
    return "".join(f"{marks[i % 2]}{turn}<|end|>" for i, turn in enumerate(turns))


def _film(data: Path) -> list[str]:
    """Sentences on films. The two collections share sentences: what one holds out, both leave."""
    task = load("sentiment", data)
    heldout = {plain(e.query) for e in task.heldout}
    more = [r["text"].strip() for r in rows(data / "sentiment/subjectivity.jsonl.gz")]
    return [e.query for e in task.train] + [t for t in more if plain(t) not in heldout]


def _reviews(data: Path) -> list[str]:
    found = rows(data / "sentiment/movie_reviews_2k_head1000.jsonl.gz")
    heldout = [plain(e.query) for e in load("sentiment", data).heldout]
    texts = [" ".join(r["text"].split()) for r in found]
    return [text for text in texts if not any(held in plain(text) for held in heldout)]


def _questions(data: Path) -> list[str]:
    return [e.query for name in TASKS if name != "sentiment" for e in load(name, data).train]


def _worked(data: Path) -> list[str]:
    """Grade-school problems with their solutions: numbers of the question return in the answer."""
    found = rows(data / "math/gsm8k.jsonl.gz")
    return [f"{r['question']}\n{r['answer']}" for r in found if r["split"] == "train"][:4000]


def _sql_text(data: Path) -> list[str]:
    return [e.answer for e in load("sql", data).train]


def _sentences(pages: Iterable[str]) -> list[str]:
    return [line for page in pages for line in page.split("\n") if 20 < len(line) < 160]


def _said_twice(texts: list[str], count: int, rng: random.Random) -> list[str]:
    return ["\n".join(2 * rng.sample(texts, 2)) for _ in range(count)]


def _groups(texts: list[str], size: int, rng: random.Random) -> list[str]:
    texts = rng.sample(texts, len(texts))
    return ["\n".join(texts[i : i + size]) for i in range(0, len(texts), size)]
