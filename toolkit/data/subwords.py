"""One subword vocabulary for both languages of translation pairs: BPE or unigram, trained on the pairs.

    tokenizer = create(config.tokenizer, texts)      # a Hugging Face fast tokenizer
    tokenizer(["Ein Hund."])["input_ids"]            # ends with </s>

As in SentencePiece a space becomes '▁', so decoding gives the text back; punctuation stands alone.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

from toolkit.config.schema import Tokenizer
from toolkit.data import tokenizer as wordpiece
from toolkit.errors import DataError

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
ALPHABET = 1000  # most characters that a vocabulary spells out; the rarer ones are <unk>


def create(config: Tokenizer, texts: Callable[[], Iterator[str]]) -> Any:
    """The configured tokenizer; ``texts()`` reads both sides, only if one is trained. Raises DataError."""
    if config.path is not None or config.model == "wordpiece":
        return wordpiece.create(config, texts)
    return _wrapped(_train(config, texts))


def _train(config: Tokenizer, texts: Callable[[], Iterator[str]]) -> Any:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    backend = Backend(models.BPE(unk_token=UNK) if config.model == "bpe" else models.Unigram())
    lower = [normalizers.Lowercase()] if config.lowercase else []
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), *lower])
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    backend.decoder = decoders.Metaspace()
    alphabet = wordpiece._alphabet(texts(), backend.normalizer, max(1, min(ALPHABET, config.vocab_size // 2)))
    if not alphabet:
        raise DataError("tokenizer: the pairs hold no word to train on. Check data.train.")
    common: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "special_tokens": [PAD, EOS, UNK],
        "initial_alphabet": ["▁", *alphabet],
        "show_progress": False,
    }
    trainer: Any = (
        trainers.BpeTrainer(min_frequency=config.min_frequency, limit_alphabet=len(alphabet) + 1, **common)
        if config.model == "bpe"
        else trainers.UnigramTrainer(unk_token=UNK, **common)
    )
    backend.train_from_iterator(texts(), trainer)
    eos = backend.token_to_id(EOS)
    backend.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, eos)])
    return backend


def _wrapped(backend: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=EOS, unk_token=UNK, clean_up_tokenization_spaces=False
    )


def digest(tokenizer: Any) -> str:
    """Equal where the ids are: training a unigram model twice gives scores that differ in the fourth digit."""
    from toolkit.data.cache import fingerprint

    return fingerprint(json.loads(tokenizer.backend_tokenizer.to_str()))
