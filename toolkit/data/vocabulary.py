"""A vocabulary trained on the texts: WordPiece as BERT's, or BPE or a unigram model of both languages of translation.

    tokenizer = train(config.tokenizer, texts)    # texts() reads them, twice; the same texts give the same ids

The sequences of pairs end with </s>; as in SentencePiece a space becomes '▁', so decoding gives the text back;
punctuation stands alone.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np

from toolkit.config.schema import Tokenizer
from toolkit.errors import DataError

SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}  # of BERT's input
PAD, EOS, UNK = "<pad>", "</s>", "<unk>"  # of translation pairs
COMMON = 1000  # characters that a vocabulary spells out in any case, where they take a quarter of it at most
LONGEST_WORD = 100  # characters that WordPiece takes apart, in quadratic time: longer runs are cut

Texts = Callable[[], Iterator[str]]
Form = Literal["NFC", "NFKC"]  # of Unicode


def train(config: Tokenizer, texts: Texts) -> Any:
    """A tokenizer of ``config.vocab_size`` entries, or of as many as the texts give. Raises DataError of no text."""
    return (_wordpiece if config.model == "wordpiece" else _subwords)(config, texts)


def _wordpiece(config: Tokenizer, texts: Texts) -> Any:
    """WordPiece over the corpus: special tokens at ids 0 to 4, the same corpus gives the same ids. The trainer numbers
    '##' characters, and breaks ties between merges by these numbers, in the order in which its hash table gives the
    words: another one each time. So they are numbered before it starts. BertTokenizer builds its own normalizer and
    limit of a word anew from a saved folder, so it is none."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizer, PreTrainedTokenizerFast

    trained = Backend(models.WordPiece(unk_token=SPECIAL["unk"]))
    clean = normalizers.BertNormalizer(strip_accents=False, lowercase=False)
    trained.normalizer = normalizers.Sequence([clean, *_letters(config, "NFC")])
    cut = [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.FixedLength(LONGEST_WORD)]
    trained.pre_tokenizer = pre_tokenizers.Sequence(cut)
    alphabet, _ = _alphabet(texts(), trained, config, "NFC", config.vocab_size - len(SPECIAL))
    trainer = trainers.WordPieceTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        special_tokens=[*SPECIAL.values(), *(f"##{c}" for c in alphabet if len(words(f"a{c}", trained)) == 1)],
        continuing_subword_prefix="##",
        show_progress=False,
    )
    trained.train_from_iterator(texts(), trainer)
    backend = BertTokenizer(trained.get_vocab()).backend_tokenizer  # for its [CLS] … [SEP]
    backend.normalizer, backend.pre_tokenizer = trained.normalizer, trained.pre_tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        do_lower_case=config.lowercase,  # for those who read it with BertTokenizer nevertheless
        strip_accents=bool(config.strip_accents),
        **{f"{name}_token": token for name, token in SPECIAL.items()},
    )


def _subwords(config: Tokenizer, texts: Texts) -> Any:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = config.model == "bpe"
    backend = Backend(models.BPE(unk_token=UNK) if bpe else models.Unigram())
    backend.normalizer = normalizers.Sequence(_letters(config, "NFKC"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    backend.decoder = decoders.Metaspace()
    alphabet, rare = _alphabet(texts(), backend, config, "NFKC", config.vocab_size - 8)  # PAD, EOS, UNK, '▁'
    trainer: Any = trainers.BpeTrainer if bpe else trainers.UnigramTrainer
    rest: dict[str, Any] = {"unk_token": UNK}
    if bpe:
        rest = {"min_frequency": config.min_frequency, "limit_alphabet": len(alphabet) + 1}
    rest |= {"special_tokens": [PAD, EOS, UNK], "initial_alphabet": ["▁", *alphabet], "show_progress": False}
    spaces = dict.fromkeys(map(ord, rare), " ")  # a unigram model would take every character in
    kept = texts() if bpe else (unicodedata.normalize("NFKC", text).translate(spaces) for text in texts())
    backend.train_from_iterator(kept, trainer(vocab_size=config.vocab_size, **rest))
    eos = backend.token_to_id(EOS)
    backend.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, eos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=EOS, unk_token=UNK, clean_up_tokenization_spaces=False
    )


def _letters(config: Tokenizer, form: Form) -> list[Any]:
    """A letter and its marks as one character, in lower case, without accents, as it is configured."""
    from tokenizers import Regex, normalizers

    # Combining Diacritical Marks are those of Latin, Greek and Cyrillic; other scripts have theirs elsewhere
    strip = [normalizers.NFD(), normalizers.Replace(Regex("[\u0300-\u036f]"), ""), normalizers.NFC()]
    lower = [normalizers.Lowercase()] if config.lowercase else []
    return [getattr(normalizers, form)(), *lower, *(strip if config.strip_accents else [])]


def words(text: str, backend: Any) -> list[str]:
    """What the tokenizer's model is given of a text, one after the other."""
    text = backend.normalizer.normalize_str(text) if backend.normalizer else text
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else [text]


def _alphabet(
    texts: Iterator[str], backend: Any, config: Tokenizer, form: Form, room: int
) -> tuple[list[str], list[str]]:
    """The characters that the vocabulary spells out, sorted, at least one: the most frequent ones after normalisation
    up to config.coverage of the text, and those that are COMMON, as far as ``room`` entries reach; WordPiece keeps most
    of them twice, alone and as '##'. And the characters of the text that hold others."""
    raw: Counter[str] = Counter()
    for text in texts:
        raw.update(unicodedata.normalize(form, text))
    normal = {character: backend.normalizer.normalize_str(character).strip() for character in raw}
    counts: Counter[str] = Counter()
    for character, number in raw.items():
        for part in normal[character]:
            counts[part] += number
    if not counts:
        raise DataError("tokenizer: the texts hold no word to train on. Check data.path, data.train and data.column.")
    ranked = sorted(counts, key=lambda c: (-counts[c], c))
    cost = np.cumsum([1 + (config.model == "wordpiece" and len(words(f"a{c}", backend)) == 1) for c in ranked])
    share = np.cumsum([counts[c] for c in ranked]) / counts.total()
    common, fits = (int(np.searchsorted(cost, entries, "right")) for entries in (room / 4, room))
    enough = max(int(np.searchsorted(share, config.coverage)) + 1, min(COMMON, common))
    chosen = ranked[: max(1, min(enough, fits))]
    return sorted(chosen), [character for character in raw if not set(normal[character]) <= set(chosen)]
