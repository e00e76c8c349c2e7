"""Rows become examples as the task needs them; every row that does not fit is named before training."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import seqeval.scheme
from composing import compose
from data_helpers import SHARED, needs_shared

from toolkit.config.schema import Data, Task
from toolkit.data import schemes, tables
from toolkit.data.examples import Choice, Example, Question, Tagged, Text, find_labels, read
from toolkit.data.lines import Problems
from toolkit.errors import DataError


def write(folder: Path, rows: list[Any]) -> str:
    path = folder / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def examples(
    folder: Path,
    kind: str,
    rows: list[Any],
    known: tuple[str, ...] | None = None,
    problems: Problems | None = None,
    labelled: bool = True,
    **keys: Any,
) -> list[Any]:
    """The examples of a file of these rows, its own labels unless others are known; keys of Data or Task."""
    data = Data.model_validate({"format": None, **{k: v for k, v in keys.items() if k in Data.model_fields}})
    task = Task.model_validate({"kind": kind, **{k: v for k, v in keys.items() if k in Task.model_fields}})
    source = write(folder, rows)
    labels = find_labels(tables.rows(source, data, "train"), data, kind) if known is None else known
    return read(source, "train" if labelled else "test", data, task, labels, problems)


def labels_of(folder: Path, kind: str, rows: list[Any], **data: Any) -> tuple[str, ...]:
    checked = Data.model_validate({"format": None, **data})
    return find_labels(tables.rows(write(folder, rows), checked, "train"), checked, kind)


def test_a_text_or_a_pair_has_the_number_of_its_label(tmp_path: Path) -> None:
    rows = [{"a": "A.", "b": "B.", "y": "yes", "n": 7}, {"a": " C", "b": "D", "y": "no", "n": 8}]
    columns = {"text": "a", "text_pair": "b", "label": "y", "id": "n"}
    assert examples(tmp_path, "classify", rows, columns=columns) == [
        Text("7", "A.", "B.", 1),
        Text("8", " C", "D", 0),
    ]
    alone = examples(tmp_path, "classify", rows, columns={"text": "a", "label": "y"})
    assert [(e.id, e.text_pair) for e in alone] == [("0", None), ("1", None)]


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["b", "a", "b", "C"], ("C", "a", "b")),
        ([10, 9, "-1.5"], ("-1.5", "9", "10")),
        ([1.0, 0, 1], ("0", "1")),
        (["10", "9", "x"], ("10", "9", "x")),
        (["a", None, ""], ("a",)),
    ],
)
def test_labels_are_those_of_the_rows_sorted(tmp_path: Path, values: list[Any], names: tuple[str, ...]) -> None:
    rows = [{"text": "A.", "label": value} for value in values]
    assert labels_of(tmp_path, "classify", rows) == names
    assert labels_of(tmp_path, "classify", rows, labels=("z", "a")) == ("z", "a")
    assert labels_of(tmp_path, "regress", rows) == labels_of(tmp_path, "choose", rows) == ()


def test_tags_found_are_bio_of_every_type(tmp_path: Path) -> None:
    rows = [{"tokens": ["a", "b"], "tags": ["I-person", "O"]}, {"tokens": ["c"], "tags": ["B-creative-work"]}]
    expected = ("O", "B-creative-work", "I-creative-work", "B-person", "I-person")
    assert labels_of(tmp_path, "tag", rows) == expected


def test_numbers_in_the_file_are_those_of_the_given_names(tmp_path: Path) -> None:
    rows = [{"text": "A.", "label": label} for label in (1, "0", "no", 1.0)]
    assert [e.label for e in examples(tmp_path, "classify", rows, labels=["no", "yes"])] == [1, 0, 0, 1]


def test_scores_are_numbers_in_their_range(tmp_path: Path) -> None:
    rows = [{"text": "A.", "label": label} for label in ("5.000", 0, 2.5)]
    assert [e.label for e in examples(tmp_path, "regress", rows, range=(0, 5))] == [5.0, 0.0, 2.5]
    assert [e.label for e in examples(tmp_path, "regress", [{"text": "A.", "label": -1}])] == [-1.0]


def test_endings_go_on_from_their_start(tmp_path: Path) -> None:
    rows = [{"p": "Rain.", "s": "It", "0": "fell.", "1": "sang.", "label": "1"}]
    columns = {"prompt": "p", "endings": ["0", "1"]}
    assert examples(tmp_path, "choose", rows, columns=columns) == [Choice("0", "Rain.", ("fell.", "sang."), 1)]
    with_start = examples(tmp_path, "choose", rows, columns=columns | {"start": "s"})
    assert with_start == [Choice("0", "Rain.", ("It fell.", "It sang."), 1)]
    without = examples(tmp_path, "choose", [rows[0] | {"s": ""}], columns=columns | {"start": "s"})
    assert without[0].endings == ("fell.", "sang.")


LABELS = ("O", "B-x", "I-x", "B-y", "I-y")
IOB2 = ["B-x", "I-x", "B-x", "I-x", "B-y", "O", "B-y", "B-x", "B-x", "B-x", "I-x", "I-x"]
SPELT = {
    "iob2": IOB2,
    "iob1": ["I-x", "I-x", "B-x", "I-x", "I-y", "O", "I-y", "I-x", "B-x", "B-x", "I-x", "I-x"],
    "ioe2": ["I-x", "E-x", "I-x", "E-x", "E-y", "O", "E-y", "E-x", "E-x", "I-x", "I-x", "E-x"],
    "ioe1": ["I-x", "E-x", "I-x", "I-x", "I-y", "O", "I-y", "E-x", "E-x", "I-x", "I-x", "I-x"],
    "iobes": ["B-x", "E-x", "B-x", "E-x", "S-y", "O", "S-y", "S-x", "S-x", "B-x", "I-x", "E-x"],
    "bmes": ["B-x", "E-x", "B-x", "E-x", "S-y", "O", "S-y", "S-x", "S-x", "B-x", "M-x", "E-x"],
    "bilou": ["B-x", "L-x", "B-x", "L-x", "U-y", "O", "U-y", "U-x", "U-x", "B-x", "I-x", "L-x"],
}


@pytest.mark.parametrize("scheme", SPELT)
def test_every_scheme_is_read_as_iob2(tmp_path: Path, scheme: str) -> None:
    """And what is spelt so is legal to seqeval's own class of the scheme, which has no BMES, and of IOE1 a part."""
    tags = SPELT[scheme]
    (found,) = examples(tmp_path, "tag", [{"tokens": list("abcdefghijkl"), "tags": tags}], LABELS, scheme=scheme)
    assert isinstance(found, Tagged) and found.tags == [LABELS.index(tag) for tag in IOB2]
    assert [s for s, number in found.misspelt.items() if not number] == [scheme]
    if scheme not in ("ioe1", "bmes"):
        theirs = seqeval.scheme.Tokens(tags, getattr(seqeval.scheme, scheme.upper())).entities
        assert [(e.tag, e.start, e.end - 1) for e in theirs] == schemes.entities(tags)
    named = ["O", *sorted(set(tags) - {"O"})]  # now as numbers, their names in data.labels
    rows = [{"tokens": list("abcdefghijkl"), "tags": [named.index(tag) for tag in tags]}]
    labels = labels_of(tmp_path, "tag", rows, labels=named)
    assert set(labels) <= set(LABELS)
    (found,) = examples(tmp_path, "tag", rows, labels, scheme=scheme, labels=named)
    assert isinstance(found, Tagged) and found.tags is not None and [labels[tag] for tag in found.tags] == IOB2


def test_an_entity_that_breaks_its_scheme_is_read_as_conlleval_reads_it_and_counted(tmp_path: Path) -> None:
    tags = ["I-x", "O", "B-x", "I-y", "O", "B-x", "I-x"]
    (found,) = examples(tmp_path, "tag", [{"tokens": list("abcdefg"), "tags": tags}], LABELS)
    read = ["B-x", "O", "B-x", "B-y", "O", "B-x", "I-x"]
    assert isinstance(found, Tagged) and found.tags == [LABELS.index(tag) for tag in read]
    assert (found.misspelt["iob2"], found.misspelt["iob1"]) == (2, 2)


SQUAD = {"id": "q", "question": "Who?", "context": "Ann met Bob."}


def test_answers_of_both_shapes_are_spans_of_the_context(tmp_path: Path) -> None:
    dicts = [{"text": "Bob", "answer_start": 8}, {"text": "Ann", "answer_start": 0}]
    lists = {"text": ["Bob", "Ann"], "answer_start": [8, 0]}
    answers = (("Bob", 8), ("Ann", 0))
    expected = Question("q", "Who?", "Ann met Bob.", answers)
    for value in (dicts, lists):
        assert examples(tmp_path, "span_qa", [SQUAD | {"answers": value}], columns={"id": "id"}) == [expected]


def test_questions_without_an_answer_are_impossible_where_the_task_allows_it(tmp_path: Path) -> None:
    for none in (
        {"answers": []},
        {"answers": {"text": [], "answer_start": []}},
        {"answers": [{"text": "Ann", "answer_start": 0}], "is_impossible": True},
    ):
        (found,) = examples(tmp_path, "span_qa", [SQUAD | none], null_answers=True)
        assert found.answers == ()


TEXT = {"text": "A."}
TAGGED = {"tokens": ["a", "b"]}
CHOICE = {"prompt": "A.", **{f"ending{i}": "B." for i in range(4)}}


@pytest.mark.parametrize("label", [{}, {"label": None}, {"label": ""}, {"label": -1}, {"label": "-1"}])
@pytest.mark.parametrize(("kind", "row"), [("classify", TEXT), ("regress", TEXT), ("choose", CHOICE)])
def test_rows_of_a_test_file_may_lack_their_label(
    tmp_path: Path, kind: str, row: dict[str, Any], label: dict[str, Any]
) -> None:
    (found,) = examples(tmp_path, kind, [row | label], ("no", "yes"), labelled=False, range=(0, 5))
    assert found.label is None
    (found,) = examples(tmp_path, kind, [row | {"label": "1"}], ("0", "1"), labelled=False)
    assert found.label == 1


def test_minus_one_is_a_score_where_the_range_holds_it(tmp_path: Path) -> None:
    for keys in ({}, {"range": (-1, 1)}):
        (found,) = examples(tmp_path, "regress", [TEXT | {"label": -1}], labelled=False, **keys)
        assert found.label == -1.0


@pytest.mark.parametrize("tags", [{}, {"tags": None}, {"tags": []}, {"tags": [None, -1]}, {"tags": ["_", "_"]}])
def test_words_of_a_test_file_may_lack_their_tags(tmp_path: Path, tags: dict[str, Any]) -> None:
    (found,) = examples(tmp_path, "tag", [TAGGED | tags], ("O",), labelled=False)
    assert found.words == ["a", "b"] and found.tags is None


@pytest.mark.parametrize("answers", [{}, {"answers": None}, {"answers": []}, {"answers": {"text": []}}])
def test_questions_of_a_test_file_may_lack_their_answers(tmp_path: Path, answers: dict[str, Any]) -> None:
    (found,) = examples(tmp_path, "span_qa", [SQUAD | answers], labelled=False)
    assert found.answers == ()


def answered(*answers: tuple[Any, Any], **more: Any) -> dict[str, Any]:
    return SQUAD | {"answers": [{"text": text, "answer_start": start} for text, start in answers]} | more


NAMES = ("no", "yes")
BAD: list[tuple[str, dict[str, Any], tuple[str, ...] | None, dict[str, Any], str]] = [
    # kind, a bad row, the labels known, keys, the message after file:row
    ("classify", {"txt": "A.", "label": "no"}, NAMES, {},
     r"no column 'text'. Did you mean 'txt'\? It has: txt, label. Set data.columns.text=<one of these>"),
    ("classify", TEXT, NAMES, {}, r"no column 'label'. It has: text. Set data.columns.label=<one of these>"),
    ("classify", TEXT | {"label": "no"}, NAMES, {"columns": {"text_pair": "c"}},
     r"no column 'c'.*Set data.columns.text_pair="),
    ("classify", TEXT | {"label": "no"}, NAMES, {"columns": {"id": "c"}}, r"no column 'c'.*Set data.columns.id="),
    ("classify", {"text": None, "label": "no"}, NAMES, {}, r"column 'text' holds None, which is no text. Fill it"),
    ("classify", {"text": " ", "label": "no"}, NAMES, {}, r"column 'text' holds ' ', which is no text"),
    ("classify", {"text": 7, "label": "no"}, NAMES, {}, r"column 'text' holds 7, which .*data.columns.text="),
    ("classify", TEXT | {"label": None}, NAMES, {}, r"column 'label' is empty. Fill it in, or .* as data.test"),
    ("classify", TEXT | {"label": ""}, NAMES, {}, r"column 'label' is empty"),
    ("classify", TEXT | {"label": "yse"}, NAMES, {},
     r"unknown label 'yse'. Did you mean 'yes'\? Known: no, yes. Correct the row, or name every label in data.labels="),
    ("classify", TEXT | {"label": 1}, NAMES, {}, r"unknown label '1'. Known: no, yes"),  # the names are the file's own
    ("classify", TEXT | {"label": -1}, None, {"labels": NAMES}, r"unknown label '-1'. Known: no, yes"),
    ("classify", TEXT | {"label": 0}, None, {"labels": ["1", "2"]}, r"unknown label '0'. Known: 1, 2"),
    ("classify", TEXT | {"label": 3}, None, {"labels": ["x", "y", "z"]},
     r"label 3 is none of the numbers 0 to 2 of data.labels \(x, y, z\)"),
    ("classify", TEXT | {"label": "?"}, tuple(f"l{i}" for i in range(99)), {}, r"unknown label .* l19, …\. "),
    ("regress", TEXT | {"label": "nan"}, None, {}, r"score 'nan' is no finite number. Correct it, or"),
    ("regress", TEXT | {"label": "good"}, None, {}, r"score 'good' is no finite number"),
    ("regress", TEXT | {"label": [1]}, None, {}, r"score \[1\] is no finite number"),
    ("regress", TEXT | {"label": 5.1}, None, {"range": (0, 5)}, r"score 5.1 is outside 0 to 5. .* data.range"),
    ("regress", TEXT | {"label": -1}, None, {"range": (0, 5)}, r"score -1 is outside 0 to 5"),
    ("choose", CHOICE | {"label": 4}, None, {}, r"label 4 is no ending's number, 0 to 3. Correct the row"),
    ("choose", CHOICE | {"label": -1}, None, {}, r"label -1 is no ending's number"),
    ("choose", CHOICE | {"label": "a"}, None, {}, r"label 'a' is no ending's number"),
    ("choose", CHOICE | {"label": 0}, None, {"columns": {"endings": ["ending0", "e1"]}},
     r"no column 'e1'.*It has: prompt, .*Set data.columns.endings=<one"),
    ("choose", CHOICE | {"label": 0, "ending2": ""}, None, {}, r"column 'ending2' holds ''"),
    ("choose", CHOICE | {"label": 0}, None, {"columns": {"start": "s"}}, r"no column 's'.*Set data.columns.start="),
    ("tag", TAGGED | {"tags": ["O"]}, None, {}, r"has 2 tokens but 1 tags. Give every token one tag"),
    ("tag", TAGGED | {"tags": "O O"}, None, {}, r"column 'tags' holds 'O O', which is no list of texts. Set data.col"),
    ("tag", TAGGED | {"tags": [0, 1]}, None, {}, r"column .tags. holds numbers. Name them in data.labels=\[O,B-…"),
    ("tag", TAGGED | {"tags": [0, 3]}, ("O", "B-x"), {"labels": ["O", "B-x"]},
     r"label 3 is none of the numbers 0 to 1 of data.labels \(O, B-x\)"),
    ("tag", {"tokens": "a b", "tags": ["O", "O"]}, None, {}, r"column 'tokens' holds 'a b', which is no list of texts"),
    ("tag", {"tokens": [], "tags": []}, None, {}, r"column 'tokens' holds \[\], which is no list of texts"),
    ("tag", TAGGED | {"tags": ["O", "PER"]}, None, {}, r"tag 'PER' is neither O nor a letter .* as B-person. Write"),
    ("tag", TAGGED | {"tags": ["O", "B-pet"]}, ("O", "B-per", "I-per"), {},
     r"unknown label 'B-pet'. Did you mean 'B-per'\? Known: O, B-per, I-per"),
    ("tag", TAGGED, None, {}, r"no column 'tags'. It has: tokens"),
    ("span_qa", answered(("Bob", 7)), None, {},
     r"answer 'Bob' is not at answer_start=7, where ' Bo' stands, but at 8. Count answer_start in characters"),
    ("span_qa", answered(("Ann", 0), ("Eve", 99)), None, {}, r"answer 'Eve' is not at answer_start=99, where ''"),
    ("span_qa", answered(("Ann", 0), (" ", 3)), None, {"null_answers": True}, r"answer ' ' is blank\. Correct it"),
    ("span_qa", answered(), None, {}, r"has no answer. Let .* task.null_answers=true \(task=squad_v2\)"),
    ("span_qa", answered(("Bob", 8), is_impossible=True), None, {}, r"has no answer"),
    ("span_qa", answered(("Bob", 8), is_impossible="False"), None, {}, r"is_impossible 'False' is neither true nor"),
    ("span_qa", answered(("Bob", "8")), None, {}, r"answers \[.*\] are no texts with their starts. Write \{text: "),
    ("span_qa", answered(("Bob.", -4)), None, {}, r"answers \[.*\] are no texts with their starts"),
    ("span_qa", SQUAD | {"answers": "Bob"}, None, {}, r"answers 'Bob' are no texts with their starts"),
    ("span_qa", SQUAD | {"answers": {"text": ["Bob"], "answer_start": []}}, None, {}, r"answers \{.*\} are no texts"),
    ("span_qa", SQUAD | {"answers": None}, None, {}, r"column 'answers' is empty"),
    ("span_qa", SQUAD, None, {}, r"no column 'answers'"),
    ("span_qa", answered(("Bob", 8), question=""), None, {}, r"column 'question' holds ''"),
    ("span_qa", answered(("Bob", 8), context=None), None, {}, r"column 'context' holds None"),
]  # fmt: skip
GOOD: dict[str, dict[str, Any]] = {
    "classify": TEXT,
    "regress": TEXT | {"label": 1},
    "choose": CHOICE | {"label": 0, "s": "It", "e1": "B."},
    "tag": TAGGED | {"tags": ["O", "O"]},
    "span_qa": answered(("Bob", 8), id="good"),
}


@pytest.mark.parametrize(("kind", "row", "known", "keys", "message"), BAD)
def test_a_row_that_does_not_fit_is_named_or_skipped_alone(
    tmp_path: Path,
    kind: str,
    row: dict[str, Any],
    known: tuple[str, ...] | None,
    keys: dict[str, Any],
    message: str,
) -> None:
    names = known or keys.get("labels") or ("",)
    good = {"c": "C.", **GOOD[kind], **({"label": names[0]} if kind == "classify" else {})}
    with pytest.raises(DataError, match=rf"^{tmp_path}/x.jsonl:2: {message}.*data.on_error=skip") as raised:
        examples(tmp_path, kind, [good, row], known, **keys)
    assert "\n" not in str(raised.value)
    problems = Problems("skip")
    assert len(examples(tmp_path, kind, [good, row, good | {"id": "2"}], known, problems, **keys)) == 2
    assert problems.skipped == 1


def test_every_question_has_its_own_id(tmp_path: Path) -> None:
    rows = [answered(("Bob", 8)), answered(("Ann", 0))]
    with pytest.raises(DataError, match=rf"x.jsonl:2: id 'q' is that of {tmp_path}/x.jsonl:1 too. Give every"):
        examples(tmp_path, "span_qa", rows, columns={"id": "id"})
    assert len(examples(tmp_path, "span_qa", rows)) == 2  # numbered
    article = {"paragraphs": [{"context": SQUAD["context"], "qas": rows}]}
    (tmp_path / "s.json").write_text(json.dumps({"data": [article]}))
    data = Data.model_validate({"format": None, "columns": {"id": "id"}})
    with pytest.raises(DataError, match=r"s.json: question q: id 'q' is that of .*s.json: question q too"):
        read(str(tmp_path / "s.json"), "train", data, Task(kind="span_qa"), ())


def test_a_file_of_which_every_row_is_skipped_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x.jsonl: all of its 2 rows are skipped. See why with data.on_error=raise"):
        examples(tmp_path, "classify", [{"label": 1}, {"label": 2}], on_error="skip")


def real(preset: str, folder: str, *overrides: str) -> dict[str, list[Example]]:
    config = compose(f"data=files/{preset}", f"data.path={SHARED / folder}", *overrides)
    data, task = config.data, config.task
    assert data.train and not isinstance(data.eval, dict)
    labels = find_labels(tables.rows(data.train, data, "train"), data, task.kind)
    sources = {"train": data.train} | ({"eval": data.eval} if data.eval else {})
    return {split: read(source, split, data, task, labels) for split, source in sources.items()}


def count(found: list[Any]) -> list[int]:
    """How many examples have each label, in the order of their numbers."""
    counts = Counter(example.label for example in found)
    return [counts[label] for label in sorted(counts)]


@needs_shared
@pytest.mark.parametrize(
    ("preset", "train", "validation"),
    [
        ("sst2", [29_780, 37_569], [428, 444]),
        ("cola", [2528, 6023], [324, 719]),
        ("mrpc", [1323, 2753], None),
        ("qqp", [5747, 3252], [623, 377]),
        ("mnli", [3061, 2980, 2958], [347, 333, 320]),
        ("qnli", [4523, 4476], [504, 496]),
        ("rte", [1249, 1241], [146, 131]),
        ("wnli", [323, 312], [40, 31]),
    ],
)
def test_the_glue_presets_read_the_real_files(preset: str, train: list[int], validation: list[int] | None) -> None:
    found = real(preset, "glue", "task.kind=classify")
    assert count(found["train"]) == train
    assert count(found.get("eval", [])) == (validation or [])
    assert all(isinstance(e, Text) and (e.text_pair is None) == (preset in ("sst2", "cola")) for e in found["train"])


@needs_shared
def test_the_stsb_preset_reads_the_real_scores() -> None:
    found = real("stsb", "glue", "task.kind=regress")
    for split, rows in (("train", 5749), ("eval", 1500)):
        scores = [e.label for e in found[split] if isinstance(e, Text) and e.text_pair]
        assert len(scores) == rows and min(scores) == 0 and max(scores) == 5


@needs_shared
def test_the_wnut_preset_reads_the_real_entities() -> None:
    found = real("wnut17", "ner/wnut17", "task.kind=tag")
    text = (SHARED / "ner" / "wnut17" / "wnut17train.conll").read_text()
    assert {split: len(sentences) for split, sentences in found.items()} == {"train": 3394, "eval": 1009}
    tags = Counter(tag for e in found["train"] if isinstance(e, Tagged) and e.tags for tag in e.tags)
    assert (
        sum(tags.values()) == 62_730 and tags[1] == text.count("\tB-corporation") and tags[12] == text.count("\tI-prod")
    )


@needs_shared
def test_the_squad_preset_reads_half_of_the_real_dev_set() -> None:
    half = f"data.train={SHARED}/squad/squad2_dev_half.json.gz"
    flat = f"data.eval={SHARED}/squad/squad_flat_sample.json"
    found = real("squad_v2", "squad", half, flat, "task.kind=span_qa", "task.null_answers=true")
    questions = [e for e in found["train"] if isinstance(e, Question)]
    assert len(questions) == 6078 and sum(not e.answers for e in questions) == 3168
    assert len(found["eval"]) == 14
    with pytest.raises(DataError, match=r"half.json.gz: question \w+: has no answer. .*task.null_answers=true"):
        real("squad", "squad", half, flat, "task.kind=span_qa")


@needs_shared
def test_the_choice_presets_read_the_real_endings() -> None:
    assert count(real("codah", "swag", "task.kind=choose")["train"]) == [689, 684, 697, 706]
    csv, lines = (f"{SHARED}/swag/swag_sample.{suffix}" for suffix in ("csv", "jsonl"))
    found = real("swag", "swag", f"data.train={csv}", f"data.eval={csv}", "task.kind=choose")
    assert count(found["train"]) == [3, 1, 7]
    assert isinstance(first := found["train"][0], Choice) and first.endings[1] == "She turns with two students."
    found = real("swag", "swag", f"data.train={lines}", "data.eval=null", "data.format=jsonl", "task.kind=choose")
    assert count(found["train"]) == [3, 2, 5]
