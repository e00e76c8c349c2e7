"""The tokenizer: a pretrained one, a WordPiece vocab.txt, or one trained on the texts.

    tokenizer = create(config.tokenizer, texts)   # a Hugging Face fast tokenizer
    tokenizer.save_pretrained(folder)             # AutoTokenizer.from_pretrained(folder) loads it

Corpus text is then encoded by :func:`encoder`, which adds and cuts nothing. Both languages of translation pairs have
one vocabulary, of BPE or unigram, whose sequences end with </s>: as in SentencePiece a space becomes '▁', so decoding
gives the text back; punctuation stands alone.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from toolkit.config.schema import Task, Tokenizer
from toolkit.data.prepared import fingerprint
from toolkit.errors import DataError

SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}  # of BERT's input
PAD, EOS, UNK = "<pad>", "</s>", "<unk>"  # of translation pairs
ALPHABET = 1000  # most characters that a vocabulary spells out; the rarer ones are unknown

Texts = Callable[[], Iterator[str]]


def create(config: Tokenizer, texts: Texts, *, slow: bool = False) -> Any:
    """The configured tokenizer; ``texts()`` reads what it is trained on, only if it is; ``slow``: it may be one without
    offsets, written in Python. Raises DataError."""
    from transformers import BertTokenizer

    if config.path is None:
        if config.model != "wordpiece":
            return _subwords(config, texts)
        return BertTokenizer(_wordpiece(config, texts), do_lower_case=config.lowercase)
    if vocab := _vocab_file(config.path):
        return BertTokenizer(_read_vocab(vocab, config.lowercase), do_lower_case=config.lowercase)
    return _pretrained(config.path, slow)


def identity(config: Tokenizer) -> list[Any]:
    """What the tokenizer's ids depend on besides the corpus; file contents, not names."""
    if config.path is None:
        return [config.vocab_size, config.lowercase, config.min_frequency]
    if vocab := _vocab_file(config.path):
        return [config.lowercase, _digest(vocab.read_bytes())]
    if (folder := Path(config.path).expanduser()).is_dir():
        files = sorted({file for of in ("*token*", "*.spm", "*.model", "vocab*") for file in folder.glob(of)})
        return [[path.name, _digest(path.read_bytes())] for path in files]
    return [digest(_pretrained(config.path, slow=True))]


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
    near = sorted(codes, key=lambda c: (_plain(c)[:2] != asked[:2], -SequenceMatcher(None, asked, _plain(c)).ratio()))
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


def vocab_size(tokenizer: Any) -> int:
    """Rows the model's embedding needs: the largest id plus one, added tokens and holes included."""
    languages = getattr(tokenizer, "lang_code_to_id", {})  # which M2M100's leaves out of its vocabulary
    return int(max([*tokenizer.get_vocab().values(), *languages.values()])) + 1


def encoder(tokenizer: Any) -> Any:
    """The Rust tokenizer for corpus text: no padding, no truncation, and '[MASK]' in a text is only text."""
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    return backend


def _wordpiece(config: Tokenizer, texts: Texts) -> dict[str, int]:
    """WordPiece over the corpus: special tokens at ids 0 to 4, the same corpus gives the same ids. The trainer numbers
    '##' characters, and breaks ties between merges by these numbers, in the order in which its hash table gives the
    words: another one each time. So they are numbered before it starts."""
    from tokenizers.implementations import BertWordPieceTokenizer

    trainer = BertWordPieceTokenizer(lowercase=config.lowercase)
    # Each character is kept twice, alone and as '##'.
    alphabet = _alphabet(texts(), trainer.normalizer, (config.vocab_size - len(SPECIAL)) // 2)
    if not alphabet:
        raise DataError("tokenizer: the corpus holds no word to train on. Check data.path and data.column.")
    continuing = [f"##{c}" for c in alphabet if len(trainer.pre_tokenizer.pre_tokenize_str(f"a{c}")) == 1]
    trainer.train_from_iterator(
        texts(),
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        special_tokens=[*SPECIAL.values(), *continuing],
        show_progress=False,
    )
    return dict(trainer.get_vocab())


def _subwords(config: Tokenizer, texts: Texts) -> Any:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = config.model == "bpe"
    backend = Backend(models.BPE(unk_token=UNK) if bpe else models.Unigram())
    lower = [normalizers.Lowercase()] if config.lowercase else []
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), *lower])
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    backend.decoder = decoders.Metaspace()
    alphabet = _alphabet(texts(), backend.normalizer, config.vocab_size // 2)
    if not alphabet:
        raise DataError("tokenizer: the pairs hold no word to train on. Check data.train.")
    trainer: Any = trainers.BpeTrainer if bpe else trainers.UnigramTrainer
    rest: dict[str, Any] = {"unk_token": UNK}
    if bpe:
        rest = {"min_frequency": config.min_frequency, "limit_alphabet": len(alphabet) + 1}
    rest |= {"special_tokens": [PAD, EOS, UNK], "initial_alphabet": ["▁", *alphabet], "show_progress": False}
    backend.train_from_iterator(texts(), trainer(vocab_size=config.vocab_size, **rest))
    eos = backend.token_to_id(EOS)
    backend.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, eos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=EOS, unk_token=UNK, clean_up_tokenization_spaces=False
    )


def _alphabet(texts: Iterator[str], normalizer: Any, most: int) -> list[str]:
    """The most frequent characters after normalisation, at least one and no more than ALPHABET, sorted."""
    raw: Counter[str] = Counter()
    for text in texts:
        raw.update(text)
    counts: Counter[str] = Counter()
    for character, number in raw.items():
        for normal in normalizer.normalize_str(character).strip():
            counts[normal] += number
    return sorted(sorted(counts, key=lambda c: (-counts[c], c))[: max(1, min(ALPHABET, most))])


def _vocab_file(path: str) -> Path | None:
    """The WordPiece vocabulary that ``path`` names: the file, or a folder that holds nothing else."""
    place = Path(path).expanduser()
    if place.is_file():
        return place
    names = {file.name for file in place.glob("*.*")} if place.is_dir() else set()
    alone = "vocab.txt" in names and not names & {"tokenizer.json", "tokenizer_config.json"}
    return place / "vocab.txt" if alone else None


def _read_vocab(path: Path, lowercase: bool) -> dict[str, int]:
    """One token per line, the id is the line number from 0."""
    tokens = path.read_text("utf-8").splitlines()
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
