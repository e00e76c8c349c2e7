"""Translations by beam search, every sentence once over all ranks; the search itself is Hugging Face's.

ids = translate(model, sources, special, decoding, replica, size=32, synced=stage == 3)   # the same on all ranks
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from toolkit.data.order import Split
from toolkit.job import ranks
from toolkit.models.seq2seq import Special
from toolkit.tasks.task import Watch


@dataclass(frozen=True)
class Decoding:
    """How translations are searched for; see toolkit/config/schema.py for the length penalty."""

    beams: int
    length_penalty: float
    max_target: int


@torch.no_grad()
def translate(
    model: Any,
    sources: Sequence[Any],
    special: Special,
    decoding: Decoding,
    replica: ranks.Replica,
    *,
    size: int,
    synced: bool,
    watch: Watch = iter,
) -> list[list[int]]:
    """Token ids of the translation of each source, special tokens included, on every rank.

    ``synced`` for ZeRO 3: each forward gathers weights, so all ranks make equally many of them; a rank whose
    sentences have ended, or that is left without any, goes on with the others.
    """
    config = _generation_config(model, special, decoding)
    found: dict[int, list[int]] = {}
    lengths = np.array([len(source) for source in sources])
    for keys in watch(Split(size, size, replica.rank, replica.world).held_out(lengths)):
        indices = [index for index in keys[:, 1].tolist() if index >= 0]
        if not indices and not synced:
            continue
        ids, mask = _inputs([sources[i] for i in indices or [0]], special.pad, model.device)
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, synced_gpus=synced)
        found |= zip(indices, out.tolist(), strict=False)  # none of them where indices is empty
    whole: dict[int, list[int]] = {}
    for part in ranks.gathered(found):
        whole |= part
    return [whole[i] for i in range(len(sources))]


def _generation_config(model: Any, special: Special, decoding: Decoding) -> GenerationConfig:
    """The model's own (BART forces its first token), with this run's search."""
    config = GenerationConfig(**model.generation_config.to_dict())
    config.update(
        max_length=None,
        max_new_tokens=decoding.max_target,
        num_beams=decoding.beams,
        length_penalty=decoding.length_penalty if decoding.beams > 1 else 1.0,
        early_stopping=False,
        do_sample=False,
        use_cache=True,
        pad_token_id=special.pad,
        eos_token_id=special.eos,
        decoder_start_token_id=special.start,
    )
    return config


def _inputs(sources: Sequence[Any], pad: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Ids and mask [sentences, longest]."""
    width = max(map(len, sources))
    rows = [np.pad(np.asarray(s, np.int64), (0, width - len(s)), constant_values=pad) for s in sources]
    real = [[1] * len(s) + [0] * (width - len(s)) for s in sources]
    return (torch.as_tensor(np.array(x)).to(device) for x in (rows, real))
