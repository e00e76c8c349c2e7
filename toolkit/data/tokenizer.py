"""The tokenizer: a pretrained one, a WordPiece vocab.txt, or one trained on the texts (vocabulary.py).

    tokenizer = save(create(config.tokenizer, texts), folder, config.tokenizer)   # for AutoTokenizer, too
    tokenizer = load(folder, config.tokenizer)    # the same again: what every text is encoded with

To it '[SEP]' in a text is text. Corpus text is encoded by :func:`encoder`, which adds and cuts nothing.
"""

import hashlib
import io
import json
import re
import string
from pathlib import Path
from typing import Any

from toolkit.config.schema import Task, Tokenizer
from toolkit.data import encodings
from toolkit.data.prepared import fingerprint
from toolkit.data.vocabulary import SPECIAL, Texts, train, words
from toolkit.errors import DataError


def create(config: Tokenizer, texts: Texts, *, slow: bool = False) -> Any:
    """The configured tokenizer, to be saved; ``texts()`` reads what it is trained on, only if it is; ``slow``: it may
    be one without offsets, written in Python. Raises DataError."""
    from transformers import BertTokenizer

    if config.path is None:
        return train(config, texts)
    if vocab := _vocab_file(config.path):
        options = {"do_lower_case": config.lowercase, "strip_accents": config.strip_accents}
        return BertTokenizer(_read_vocab(vocab, config.lowercase), **options)
    if config.strip_accents is not None:
        raise DataError(
            f"tokenizer.strip_accents={config.strip_accents} with tokenizer.path={config.path}: a saved one keeps or "
            "strips accents as it was saved. Drop it."
        )
    return _pretrained(config.path, slow)


def save(tokenizer: Any, folder: Path, config: Tokenizer) -> Any:
    """Save it for ``AutoTokenizer``, to which '[MASK]' is the special token, as people expect, and :func:`load` it."""
    tokenizer.save_pretrained(folder)
    said = folder / "tokenizer_config.json"  # transformers 4 has another name for the class, which 5 knows, too
    said.write_text(said.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'))
    return load(folder, config)


def load(folder: Path, config: Tokenizer) -> Any:
    """The tokenizer for all texts, in which the names of special tokens are text, unless config.special_in_text. It is
    not to be saved."""
    from tokenizers import Regex, pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.split_special_tokens = not config.special_in_text
    if config.special_in_text or not tokenizer.is_fast:
        return tokenizer
    backend = tokenizer.backend_tokenizer
    # Where nothing cuts '</s>' in pieces, Unigram finds it among its ordinary entries: it is cut after the '<'
    kept = [n for n in special_names(tokenizer) if len(n) > 1 and any(n in piece for piece in words(n, backend))]
    if kept:
        first = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in kept)
        before = [backend.pre_tokenizer] if backend.pre_tokenizer else []
        cut = pre_tokenizers.Split(Regex(first), "merged_with_previous")
        backend.pre_tokenizer = pre_tokenizers.Sequence([*before, cut])
    return tokenizer


def identity(config: Tokenizer) -> list[Any]:
    """What the tokenizer's ids depend on besides the corpus; file contents, not names."""
    if config.path is None:
        return [config.model_dump(mode="json", exclude={"path", "max_unknown"})]
    keys = [config.lowercase, config.strip_accents, config.special_in_text]
    if vocab := _vocab_file(config.path):
        return [*keys, _digest(vocab.read_bytes())]
    if (folder := Path(config.path).expanduser()).is_dir():
        names = "*token*", "vocab*", "merges*", "*.model", "*.spm"
        files = sorted({file for name in names for file in folder.glob(name)})
        return [*keys, [[file.name, _digest(file.read_bytes())] for file in files if file.is_file()]]
    return [*keys, digest(_pretrained(config.path, slow=True))]


def digest(tokenizer: Any) -> str:
    """Equal where the ids are: training a unigram model twice gives scores that differ in the fourth digit."""
    return fingerprint(json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else tokenizer.get_vocab())


def set_languages(tokenizer: Any, task: Task) -> None:
    """Tell a tokenizer of many languages (mBART's, M2M100's, NLLB's) which two a run has. Raises DataError."""
    codes = list(getattr(tokenizer, "lang_code_to_id", None) or tokenizer.extra_special_tokens)
    for side, name in (("source", "src_lang"), ("target", "tgt_lang")):
        given, suffix = getattr(task, f"{side}_code"), getattr(task, side)
        if hasattr(tokenizer, "src_lang"):
            setattr(tokenizer, name, _language(side, given, suffix, codes))
        elif given:
            raise DataError(f"task.{side}_code={given}: without effect, for the tokenizer knows no languages. Drop it.")


def _language(side: str, given: str | None, suffix: str, codes: list[str]) -> str:
    """The code that is ``given``, or else the one for files of this suffix: of ``de`` de_DE, of ``deu`` deu_Latn."""
    asked = _plain(given or suffix)
    for found in ([c for c in codes if asked == form(c)] for form in (_plain, lambda c: _plain(c).split("_")[0])):
        if len(found) == 1:
            return found[0]
    near = [c for c in codes if _plain(c)[:2] == asked[:2]] or codes
    key = f"task.{side}_code={given}" if given else f"task.{side}={suffix}"
    several = "several languages" if found else "no language"
    raise DataError(
        f"{key}: {several} of the tokenizer's {len(codes)}. Set task.{side}_code: {', '.join(found or near[:5])} …"
    )


def _plain(code: str) -> str:
    return code.strip("_").replace("-", "_").lower()


def special_ids(tokenizer: Any) -> dict[str, int]:
    """The ids of pad, unk, cls, sep and mask. Raises DataError naming the ones that are missing."""
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in SPECIAL}
    if missing := [SPECIAL[name] for name, value in ids.items() if value is None]:
        raise DataError(f"tokenizer: has no {', '.join(missing)}. Use a BERT tokenizer, or train one (path=null).")
    return ids


def special_names(tokenizer: Any) -> list[str]:
    """What stands for special tokens where they are written out: '[SEP]', '<extra_id_0>'."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content]


def vocab_size(tokenizer: Any) -> int:
    """Rows the model's embedding needs: the largest id plus one, added tokens and holes included."""
    languages = getattr(tokenizer, "lang_code_to_id", {})  # which M2M100's leaves out of its vocabulary
    return int(max([*tokenizer.get_vocab().values(), *languages.values()])) + 1


def pieces(tokenizer: Any) -> list[int]:
    """The ids of tokens that continue a word: those with WordPiece's '##', or those without the mark of a word's begin
    (byte-level 'Ġ', SentencePiece '▁'), special tokens and punctuation apart. None, where words have no marks."""
    vocab = {
        token: number for token, number in tokenizer.get_vocab().items() if number not in tokenizer.all_special_ids
    }
    model = tokenizer.backend_tokenizer.model
    if prefix := getattr(model, "continuing_subword_prefix", None):
        return [number for token, number in vocab.items() if token.startswith(prefix)]
    starts = max("Ġ▁", key=lambda mark: sum(token.startswith(mark) for token in vocab))
    if getattr(model, "end_of_word_suffix", None) or not any(token.startswith(starts) for token in vocab):
        return []
    return [n for token, n in vocab.items() if not token.startswith(starts) and token.strip(string.punctuation)]


def encoder(tokenizer: Any) -> Any:
    """The Rust tokenizer for corpus text: no padding, no truncation, and '[MASK]' in a text is what it is to
    ``tokenizer``: text, if that was loaded so."""
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


def _vocab_file(path: str) -> Path | None:
    """The WordPiece vocabulary that ``path`` names: the file, or a folder that holds nothing else."""
    place = Path(path).expanduser()
    if place.is_file():
        return place
    names = {file.name for file in place.glob("*.*")} if place.is_dir() else set()
    alone = "vocab.txt" in names and not names & {"tokenizer.json", "tokenizer_config.json"}
    return place / "vocab.txt" if alone else None


def _read_vocab(path: Path, lowercase: bool) -> dict[str, int]:
    """One token per line, the id is the line number from 0, as Hugging Face's load_vocab has it: U+2028 ends no line. A
    byte order mark and blank lines at the end, which it takes for entries, are none."""
    try:
        with io.TextIOWrapper(encodings.opened(path), "utf-8-sig") as file:
            tokens = [line.rstrip("\n") for line in file]
    except (UnicodeDecodeError, OSError, EOFError) as error:  # also what ends with .gz and is not gzip
        why = encodings.way_out(path, 0) if isinstance(error, UnicodeDecodeError) else error
        raise DataError(f"tokenizer.path={path}: cannot be read as UTF-8 text. {why}.") from error
    while tokens and not tokens[-1].strip(" \t"):
        tokens.pop()
    vocab = {token: number for number, token in enumerate(tokens)}
    if missing := [token for token in SPECIAL.values() if token not in vocab]:
        raise DataError(f"tokenizer.path={path}: has no {', '.join(missing)}. Use a BERT vocab.txt.")
    capital = next((token for token in tokens if token[:1] != "[" and token != token.lower()), None)
    if lowercase and capital:
        raise DataError(
            f"tokenizer.lowercase=true with tokenizer.path={path}: the vocabulary is cased "
            f"(it has {capital!r}). Use tokenizer.lowercase=false."
        )
    return vocab


def _pretrained(path: str, slow: bool) -> Any:
    from transformers import AutoTokenizer

    place = Path(path).expanduser()
    if path[0] in "~./" and not place.exists():  # the library would look for it on the hub
        raise DataError(f"tokenizer.path={path}: does not exist. Correct it, or train one (path=null).")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(place) if place.exists() else path)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"tokenizer.path={path}: no tokenizer could be loaded ({reason}) "
            "Name a file vocab.txt, a Hugging Face folder or a hub model, or train one (path=null)."
        ) from error
    if not (tokenizer.is_fast or slow):
        raise DataError(f"tokenizer.path={path}: has no tokenizer.json. Use one with a fast tokenizer.")
    if tokenizer.pad_token is None:  # as with GPT-2 and Llama; padding is masked, whatever it is
        if tokenizer.eos_token is None:
            raise DataError(
                f"tokenizer.path={path}: has neither a token for padding nor one that ends a text. Give it a pad_token."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
