"""A tokenizer of transformers as the vocabulary in a GGUF file.

Two kinds are known to llama.cpp and to us: byte-level BPE, whose rules for splitting text before
merging have names there, and SentencePiece's BPE with bytes to fall back on. A splitting rule
without a name is refused. The order of merges becomes a score per token, as it was in the
SentencePiece model that the merges were taken from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from loramix.errors import FormatError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?" + _TAIL % r"\p{N}{1,3}"
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?" + _TAIL % r"\p{N}"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")

FIRST = (
    "llama.cpp puts a blank after special tokens and before leading blanks too, this tokenizer "
    "only where a text begins with another character."
)

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer."""

    model: str  # "gpt2" (byte-level BPE) or "llama" (SentencePiece)
    pre: str  # llama.cpp's name for how text is split before it is merged
    tokens: list[str]
    types: list[TokenType]
    merges: list[str]  # of byte-level BPE
    scores: list[float]  # of SentencePiece
    space_prefix: bool
    template: str | None
    special: Mapping[str, int]  # ids by "bos", "eos", "unk", "pad"
    adds: Mapping[str, bool]  # "bos", "eos": put around every prompt

    def describe(self, writer: GGUFWriter) -> None:
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.model == "gpt2":
            writer.add_token_merges(self.merges)
        else:
            writer.add_token_scores(self.scores)
        writer.add_add_space_prefix(self.space_prefix)
        for name, id in self.special.items():
            getattr(writer, f"add_{name}_token_id")(id)
        writer.add_add_bos_token(self.adds["bos"])
        writer.add_add_eos_token(self.adds["eos"])
        if self.template:
            writer.add_chat_template(self.template)


def vocabulary(tokenizer: PreTrainedTokenizerBase, size: int, tell: Tell) -> Vocabulary:
    """The vocabulary of a model with `size` embeddings; `tell` hears what is not quite the same.

    Raises FormatError for a tokenizer llama.cpp has no name for.
    """
    tree = _tree(tokenizer)
    model = tree["model"]
    if model.get("type") != "BPE":
        raise FormatError(f"A tokenizer of type {model.get('type')} has no GGUF layout; BPE has.")
    spm = bool(model.get("byte_fallback"))
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    tokens = _tokens(tree, size)
    return Vocabulary(
        model="llama" if spm else "gpt2",
        pre="default" if spm else _splitting(tree, tell),
        tokens=tokens,
        types=_types(tree, tokens, spm),
        merges=[] if spm else [" ".join(pair) for pair in merges],
        scores=_scores(tokens, merges) if spm else [],
        space_prefix=_space_prefix(tree, tell) if spm else False,
        template=_template(tokenizer),
        special=_special(tokenizer),
        adds=_adds(tokenizer),
    )


def _tree(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise FormatError(
            f"{type(tokenizer).__name__} is no fast tokenizer; save it with a tokenizer.json."
        )
    tree: dict[str, Any] = json.loads(backend.to_str())
    return tree


def _tokens(tree: Mapping[str, Any], size: int) -> list[str]:
    """The text of each id; ids of the model that no text has are filled up."""
    texts = {id: text for text, id in tree["model"]["vocab"].items()}
    texts |= {token["id"]: token["content"] for token in tree["added_tokens"]}
    if texts and max(texts) >= size:
        raise FormatError(
            f"The tokenizer has {max(texts) + 1} tokens, the model {size}; they do not belong "
            f"together, or the model was not resized."
        )
    return [texts.get(id, f"[PAD{id}]") for id in range(size)]


def _types(tree: Mapping[str, Any], tokens: list[str], spm: bool) -> list[TokenType]:
    vocab = tree["model"]["vocab"]
    types = [TokenType.NORMAL if text in vocab else TokenType.UNUSED for text in tokens]
    if spm:
        for id, text in enumerate(tokens):
            if _BYTE.fullmatch(text):
                types[id] = TokenType.BYTE
    for token in tree["added_tokens"]:
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    if spm and (unknown := tree["model"].get("unk_token")) in tokens:
        types[tokens.index(unknown)] = TokenType.UNKNOWN
    return types


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """Earlier merges win: minus the rank of the first merge that makes a token.

    llama.cpp joins any two tokens that make a third. So do merges that were taken from a
    SentencePiece model; FormatError for others.
    """
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    known, made = set(tokens), set(merges)
    for text in ranks:
        halves = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        for left, right in halves:
            if left in known and right in known and (left, right) not in made:
                raise FormatError(
                    f"This tokenizer never joins {left!r} and {right!r} to {text!r}, llama.cpp "
                    f"would: it was not made from a SentencePiece model."
                )
    return [-float(ranks.get(text, len(merges) if len(text) > 1 else 0)) for text in tokens]


def _splitting(tree: Mapping[str, Any], tell: Tell) -> str:
    """llama.cpp's name for the rule that splits text before merging."""
    steps = _steps(tree["pre_tokenizer"])
    normalizers = [step["type"] for step in _steps(tree["normalizer"])]
    if normalizers == ["NFC"]:
        tell("llama.cpp does not normalise text; give it NFC, as nearly all text is.")
    elif normalizers:
        raise FormatError(f"No GGUF layout for the normaliser {', '.join(normalizers)}.")
    kept = [step for step in steps if not _never_merged(step, tree, tell)]
    found = _known(kept)
    if found is None:
        shown = ", ".join(step["type"] for step in steps) or "none"
        raise FormatError(
            f"llama.cpp has no name for how this tokenizer splits text ({shown}); known are GPT-2, "
            f"Llama 3, Qwen 2 and 3, and SmolLM."
        )
    whole = bool(tree["model"].get("ignore_merges"))
    if whole != (found == "llama-bpe"):
        raise FormatError(f"ignore_merges is {whole} in a tokenizer that splits as {found} does.")
    return found


def _known(steps: list[dict[str, Any]]) -> str | None:
    *before, last = steps or [{"type": None}]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if last.get("use_regex", True):
        if not before:
            return "gpt-2"
        digits = len(before) == 1 and before[0]["type"] == "Digits"
        return "smollm" if digits and before[0]["individual_digits"] else None
    if len(before) != 1 or before[0]["type"] != "Split" or before[0]["invert"]:
        return None
    pattern = before[0]["pattern"].get("Regex")
    return {_LLAMA3: "llama-bpe", _QWEN2: "qwen2"}.get(pattern)


def _never_merged(step: Mapping[str, Any], tree: Mapping[str, Any], tell: Tell) -> bool:
    """Whether a split at one character changes no merge, as none crosses it."""
    if step["type"] != "Split" or step["behavior"] != "Isolated" or step["invert"]:
        return False
    char = step["pattern"].get("Regex") or step["pattern"].get("String") or ""
    if len(char) != 1 or char in r".^$*+?()[]{}|\ " or not char.isascii():
        return False
    if any(char in token and token != char for token in tree["model"]["vocab"]):
        return False
    tell(f"llama.cpp splits several blanks before {char!r} in another way than this tokenizer.")
    return True


def _space_prefix(tree: Mapping[str, Any], tell: Tell) -> bool:
    """Whether a blank is put before a text, which SentencePiece models may do."""
    normalizers, splits = _steps(tree["normalizer"]), _steps(tree["pre_tokenizer"])
    kinds = {step["type"] for step in (*normalizers, *splits)}
    if unknown := kinds - {"Prepend", "Replace", "Metaspace", "Split"}:
        raise FormatError(f"No GGUF layout for {', '.join(sorted(unknown))} in a SentencePiece.")
    if any(step["type"] == "Prepend" for step in normalizers):
        return True
    schemes = [step["prepend_scheme"] for step in splits if step["type"] == "Metaspace"]
    if "first" in schemes:
        tell(FIRST)
    return any(scheme != "never" for scheme in schemes)


def _steps(part: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """A pipeline of the tokenizer, flat."""
    if part is None:
        return []
    inner = part.get("pretokenizers", part.get("normalizers"))
    return [dict(part)] if inner is None else [step for each in inner for step in _steps(each)]


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template = tokenizer.chat_template
    return template if isinstance(template, str) and template.strip() else None


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    return {name: id for name, id in ids.items() if id is not None}


def _adds(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    ids = tokenizer("a")["input_ids"]
    return {"bos": ids[0] == tokenizer.bos_token_id, "eos": ids[-1] == tokenizer.eos_token_id}
