"""What a tokenizer loses of texts, counted while they are encoded: unknown characters, stripped vowels, special tokens.

found = {"train": lost(tokenizer, texts)}            # what toolkit.data.tokenizer.load gave
warnings(config.tokenizer, tokenizer, found)         # a line each
refuse(config.tokenizer, found)                      # raises DataError; of data that is found in the cache, too
"""

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from math import inf
from typing import Any

from toolkit.config.schema import Tokenizer
from toolkit.data import tokenizer as tokenizers
from toolkit.data.vocabulary import LONGEST_WORD
from toolkit.errors import DataError

DOUBTFUL = 0.01  # share of the characters, or of the texts, from which on it is said
VIETNAMESE = "\u0309\u031b\u0323"  # the marks of Latin letters that are no accents
COUNTED = ("texts", "named", "characters", "unknown", "long", "capital", "stripped")
Counts = dict[str, int]


class Lost:
    """``counts``: texts, those that name a special token, characters without blanks, of these the unknown ones, the
    ones in unknown words that are too long for WordPiece or have capitals that no entry has, and the stripped marks
    that are vowels or tones."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.unknown = tokenizer, tokenizer.unk_token_id
        self.backend = tokenizers.encoder(tokenizer) if tokenizer.is_fast else None
        self.longest = getattr(self.backend and self.backend.model, "max_input_chars_per_word", inf)
        special = tokenizers.special_names(tokenizer)
        self.names = special if tokenizer.split_special_tokens else []
        capitals = (token for token in {*tokenizer.get_vocab()} - {*special} if token != token.lower())
        self.uncased = _normal(tokenizer, "A") == "A" and next(capitals, None) is None
        self.strips = _normal(tokenizer, "\u0e02\u0e48") == _normal(tokenizer, "\u0e02")  # Thai's tones, say
        self.counts: Counts = dict.fromkeys(COUNTED, 0)

    def add(self, texts: Sequence[str], ids: Sequence[Sequence[int]] | None = None) -> None:
        """Count ``texts``; ``ids``: their tokens, where these are known."""
        found: Counter[str] = Counter(texts=len(texts))
        whole = "\n".join(texts)
        found["characters"] = len(whole) - whole.count(" ") - whole.count("\n")
        if names := [name for name in self.names if name in whole]:
            found["named"] = sum(any(name in text for name in names) for text in texts)
        if self.strips:
            found["stripped"] = sum(whole.count(character) for character in set(whole) if self._stripped(character))
        if ids is None and self.backend:
            ids = [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        doubtful = [t for t, own in zip(texts, ids, strict=True) if self.unknown in own] if ids is not None else texts
        for part in self._unknown(doubtful):
            found["unknown"] += len(part)
            found["long"] += len(part) * (len(part) > self.longest)
            found["capital"] += len(part) * (self.uncased and part != part.lower())
        self.counts = {name: number + found[name] for name, number in self.counts.items()}

    def _unknown(self, texts: Sequence[str]) -> Iterator[str]:
        """The parts of texts that are unknown, each a token; their places take longer to find than ids."""
        if self.backend is None:
            pieces = chain.from_iterable(map(self.tokenizer.tokenize, texts))
            yield from (p.strip("▁") for p in pieces if self.tokenizer.convert_tokens_to_ids(p) == self.unknown)
            return
        for text, e in zip(texts, self.backend.encode_batch(texts, add_special_tokens=False), strict=True):
            spans = (span for token, span in zip(e.ids, e.offsets, strict=True) if token == self.unknown)
            yield from (text[start:end].strip() for start, end in spans)

    def _stripped(self, character: str) -> bool:
        """Whether a mark of the character is lost that is no accent of a Latin, Greek or Cyrillic letter."""
        before, after = (unicodedata.normalize("NFD", text) for text in (character, _normal(self.tokenizer, character)))
        marks = {mark for mark in before if unicodedata.category(mark) == "Mn"}
        return any((m in VIETNAMESE or not "\u0300" <= m <= "\u036f") and m not in after for m in marks)


def lost(tokenizer: Any, texts: Iterator[str]) -> Counts:
    """The counts of all ``texts``."""
    found = Lost(tokenizer)
    while some := list(islice(texts, 1000)):
        found.add(some)
    return found.counts


def warnings(config: Tokenizer, tokenizer: Any, lost: dict[str, Counts]) -> list[str]:
    """A line for each thing that makes the ids doubtful."""
    said = []
    size = tokenizers.vocab_size(tokenizer)
    if config.path is None and size < config.vocab_size:
        said.append(
            f"tokenizer.vocab_size={config.vocab_size}: the texts gave only {size:,} entries, with "
            f"tokenizer.min_frequency={config.min_frequency}. Add text, or ask for a smaller vocabulary."
        )
    if config.path and not config.lowercase and _normal(tokenizer, "A") == "a":
        said.append(
            f"tokenizer.lowercase=false without effect: tokenizer.path={config.path} was saved as one that lowercases. "
            "Use the tokenizer of a cased model."
        )
    for name, counts in lost.items():
        if _share(counts, "unknown") > DOUBTFUL:
            said.append(_unknown(config, name, counts))
        if _share(counts, "stripped") > DOUBTFUL:
            said.append(
                f"{name}: the tokenizer strips {_share(counts, 'stripped'):.1%} of the characters, marks that are "
                "vowels or tones, and words that differ by them alone become one. Use tokenizer.strip_accents=false if "
                "tokenizer.path is a vocab.txt made so, or the tokenizer of a cased model."
            )
        if counts["named"] > DOUBTFUL * counts["texts"]:
            said.append(
                f"{name}: {counts['named']:,} of {counts['texts']:,} texts hold the name of a special token, such as "
                "'[SEP]', which is read as text. Use tokenizer.special_in_text=true if it is to be that token."
            )
    return said


def refuse(config: Tokenizer, lost: dict[str, Counts]) -> None:
    """Raises DataError where more characters are unknown than config.max_unknown."""
    for name, counts in lost.items():
        if _share(counts, "unknown") > config.max_unknown:
            raise DataError(
                f"{_unknown(config, name, counts)} More than tokenizer.max_unknown={config.max_unknown} is refused; "
                "tokenizer.max_unknown=1 allows it."
            )


def _unknown(config: Tokenizer, name: str, counts: Counts) -> str:
    tokenizer = "the trained vocabulary" if config.path is None else f"tokenizer.path={config.path}"
    cause, way_out = "it does not have them", "Raise tokenizer.vocab_size or tokenizer.coverage."
    if counts["long"] > counts["unknown"] / 2:
        cause = f"most stand in words of more than {LONGEST_WORD} characters, which WordPiece does not read"
    if config.path:
        way_out = (
            "Use tokenizer.path (or model.weights, with the tokenizer that it has) of a model for this language and "
            "writing, or train one (tokenizer.path=null)."
        )
        if counts["capital"] > counts["unknown"] / 2:
            cause, way_out = "most stand in words with capitals, which it has none of", "Use tokenizer.lowercase=true."
    return f"{name}: {_share(counts, 'unknown'):.1%} of the characters are unknown to {tokenizer}: {cause}. {way_out}"


def _normal(tokenizer: Any, text: str) -> str:
    normalizer = tokenizer.backend_tokenizer.normalizer if tokenizer.is_fast else None
    return str(normalizer.normalize_str(text)) if normalizer else text


def _share(counts: Counts, name: str) -> float:
    return counts[name] / max(counts["characters"], 1)
