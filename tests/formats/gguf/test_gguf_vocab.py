"""Tokenizers in GGUF: llama.cpp makes the same tokens of the same text."""

from __future__ import annotations

import gzip
import json
import shutil

import pytest
from gguf import GGUFReader, TokenType
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from loramix.errors import FormatError
from loramix.folders import POCKET_BASE
from loramix.formats.checkpoint import open_checkpoint
from loramix.formats.gguf.model import write_model
from loramix.formats.gguf.vocab import _LLAMA3, _QWEN2, vocabulary
from tests.formats.gguf.families import family_model
from tests.formats.gguf.llamacpp import LlamaCpp
from tests.tiny import MERGES, SPECIAL, tiny_tokenizer

TEXTS = (
    "hello there, the other one",
    "  two blanks\tand a tab\n\nand\r\nlines   ",
    "it's 12345 or 3.14, isn't it? I'LL SEE",
    "naïve café, 日本語 and 🙂🏽 ok",
    "def f(x_y):\n    return {x_y: '$%&'}",
    "<user>the question</s><assistant>",
    " a",
    "",
)


def byte_level(*before, regex=True, ignore_merges=False, normalizer=None):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*SPECIAL, *letters, *("".join(pair) for pair in MERGES)]
    bpe = models.BPE({w: i for i, w in enumerate(words)}, MERGES, ignore_merges=ignore_merges)
    tokenizer = Tokenizer(bpe)
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, last]) if before else last
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    return finish(tokenizer)


def sentencepiece(prepend=True, closed=True):
    """As Llama 2's was converted, or Gemma's, which puts no blank before a text."""
    pairs = [("h", "e"), ("l", "l"), ("▁", "t"), ("▁t", "he"), ("▁", "a"), ("o", "n"), ("he", "r")]
    pairs += [("▁a", "n"), ("▁an", "d"), ("e", "r"), ("t", "h"), ("th", "er"), ("▁", "▁")]
    plain = {c for c in "".join(TEXTS) if c.isascii() and c > " "}
    letters = sorted((plain - {"<", ">"}) | {"▁"})
    made = ["".join(pair) for pair in pairs]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *made, *letters]
    vocab = {word: i for i, word in enumerate(words)}
    if closed:
        cuts = ((word[:i], word[i:]) for word in made for i in range(1, len(word)))
        pairs = [(a, b) for a, b in cuts if a in vocab and b in vocab]
    bpe = models.BPE(vocab, pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(bpe)
    replace = normalizers.Replace(" ", "▁")
    both = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    tokenizer.normalizer = both if prepend else replace
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return finish(tokenizer, ["<unk>", "<s>", "</s>"])


def finish(tokenizer, special=SPECIAL):
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(["<extra>"])
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def split(pattern, behavior="isolated"):
    return pre_tokenizers.Split(Regex(pattern), behavior)


MADE = {
    "gpt2": lambda: byte_level(),
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True)),
    "qwen2": lambda: byte_level(split(_QWEN2), regex=False, normalizer=normalizers.NFC()),
    "llama3": lambda: byte_level(split(_LLAMA3), regex=False, ignore_merges=True),
    "llama2": lambda: sentencepiece(),
    "gemma": lambda: sentencepiece(prepend=False),
}


def write(tokenizer, folder):
    family_model("llama", vocab_size=len(tokenizer) + 3).save_pretrained(folder / "model")
    checkpoint = open_checkpoint(str(folder / "model"))
    write_model(checkpoint, tokenizer, folder / "m.gguf", kind="f16")
    return folder / "m.gguf"


@pytest.mark.parametrize("made", MADE)
def test_llama_cpp_makes_the_same_tokens(made, tmp_path):
    tokenizer = MADE[made]()
    theirs = LlamaCpp(write(tokenizer, tmp_path))
    for text in TEXTS:
        assert theirs.tokenize(text) == tokenizer(text)["input_ids"], text


@pytest.mark.parametrize("name", ["gpt2", "llama2", "qwen3"])
def test_real_tokenizers(name, data_dir, tmp_path):
    for file in (data_dir / "tokenizers" / name).iterdir():
        target = tmp_path / "tokenizer" / file.name.removesuffix(".gz")
        target.parent.mkdir(exist_ok=True)
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as source:
            target.write_bytes(source.read())
    (tmp_path / "tokenizer" / "tokenizer.model").unlink(missing_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    theirs = LlamaCpp(write(tokenizer, tmp_path))
    raw = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    if name == "llama2":  # transformers leaves out the blank before a text that begins with some
        raw = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    plain = [text for text in TEXTS if "</s>" not in text]
    for text in (*plain, *("".join(plain[i:]) for i in range(4))):
        assert theirs.tokenize(text) == raw.encode(text).ids, text
    shutil.rmtree(tmp_path)


def test_pocket_speaks_in_llama_cpp_as_here(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(POCKET_BASE)
    said = []
    file = tmp_path / "pocket.gguf"
    write_model(open_checkpoint("pocket"), tokenizer, file, kind="f32", tell=said.append)
    theirs = LlamaCpp(file)
    assert len(said) == 1
    assert "blanks before '_'" in said[0]
    for text in (*TEXTS, "snake_case __init__ a_b"):
        assert theirs.tokenize(text) == tokenizer(text)["input_ids"], text


def test_what_tokens_are_and_what_surrounds_a_prompt(tmp_path):
    words = vocabulary(sentencepiece(), 330, print)
    kinds = {text: words.types[id] for id, text in enumerate(words.tokens)}
    assert kinds["<unk>"] == TokenType.UNKNOWN
    assert kinds["<s>"] == TokenType.CONTROL
    assert kinds["<0x0A>"] == TokenType.BYTE
    assert kinds["<extra>"] == TokenType.USER_DEFINED
    assert kinds["▁the"] == TokenType.NORMAL
    assert kinds["[PAD329]"] == TokenType.UNUSED
    assert (words.adds, words.special["eos"]) == ({"bos": True, "eos": False}, 2)
    plain = tiny_tokenizer()
    fields = GGUFReader(write(plain, tmp_path)).fields
    assert fields["tokenizer.chat_template"].contents() == plain.chat_template
    assert not fields["tokenizer.ggml.add_bos_token"].contents()


def unigram():
    return finish(Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0)), ["<unk>"])


REFUSED = {
    "type Unigram": unigram,
    "splits text": lambda: byte_level(split(r"\p{N}{1,2}"), regex=False),
    r"splits text \(Whitespace, ByteLevel\)": lambda: byte_level(pre_tokenizers.Whitespace()),
    "normaliser Lowercase": lambda: byte_level(normalizer=normalizers.Lowercase()),
    "never joins 'h' and 'er' to 'her'": lambda: sentencepiece(closed=False),
    "ignore_merges is True": lambda: byte_level(ignore_merges=True),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_tokenizer_without_a_name_there_is_refused(message):
    with pytest.raises(FormatError, match=message):
        vocabulary(REFUSED[message](), 400, print)


def test_a_tokenizer_larger_than_its_model_is_refused():
    with pytest.raises(FormatError, match=r"has 268 tokens, the model 260"):
        vocabulary(tiny_tokenizer(), 260, print)


def test_the_order_of_merges_is_the_score():
    words = vocabulary(sentencepiece(), 330, print)
    scores = dict(zip(words.tokens, words.scores, strict=True))
    assert scores["he"] > scores["ll"] > scores["▁the"] > scores["ther"]
    assert json.dumps(words.merges) == "[]"
