"""How tags spell entities: every scheme is read alike, and is IOB2 within.

    found = entities(["U-PER", "O", "B-LOC", "L-LOC"])    # [("PER", 0, 0), ("LOC", 2, 3)]
    spelt(found, 4, "iob2")    # ["B-PER", "O", "B-LOC", "I-LOC"]

Their letters never contradict each other, so one reader serves all schemes: conlleval's, to which a tag that breaks its
scheme (I- after O in IOB2) begins an entity too.
"""

import re
from collections.abc import Sequence

Entity = tuple[str, int, int]  # its type, its first and its last word

# The letters of an entity's first word, of those inside, of its last, and of one that stands alone. IOB1 begins, and
# IOE1 ends, with another only where an entity touches one of its own type (Tjong Kim Sang and Veenstra 1999)
LETTERS = {
    "iob2": "BIIB", "iob1": "IIII", "ioe2": "IIEE", "ioe1": "IIII", "iobes": "BIES", "bilou": "BILU", "bmes": "BMES",
}  # fmt: skip
_AS_IOBES = str.maketrans("LUM", "ESI")
TAG = re.compile("O|[BIELMSU]-.+", re.DOTALL)


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of a sentence, in their order; tags are O, or a letter, a hyphen and a type."""
    from seqeval.metrics.sequence_labeling import get_entities

    return list(get_entities([tag[0].translate(_AS_IOBES) + tag[1:] for tag in tags]))


def spelt(found: Sequence[Entity], words: int, scheme: str) -> list[str]:
    """The tags of a sentence of so many words."""
    tags = ["O"] * words
    first, inside, last, alone = list(LETTERS[scheme])
    for number, (kind, begin, end) in enumerate(found):
        letters = [first, *inside * (end - begin - 1), last] if begin < end else [alone]
        if scheme == "iob1" and any((k, e) == (kind, begin - 1) for k, _, e in found[:number]):
            letters[0] = "B"
        if scheme == "ioe1" and any((k, b) == (kind, end + 1) for k, b, _ in found[number:]):
            letters[-1] = "E"
        tags[begin : end + 1] = [f"{letter}-{kind}" for letter in letters]
    return tags


def misspelt(found: Sequence[Entity], tags: Sequence[str], scheme: str) -> int:
    """How many of the entities a scheme spells otherwise than these tags."""
    right = spelt(found, len(tags), scheme)
    return sum(right[begin : end + 1] != list(tags[begin : end + 1]) for _, begin, end in found)
