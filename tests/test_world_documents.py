"""A corpus whose documents are not where data.documents looks is refused where every pair would be random, and told
where most would; long paragraphs of any script are cut between sentences."""

from pathlib import Path
from typing import Any

import pytest
from world_cases import Case, cases, parts, told, warnings

from toolkit.config.schema import RunConfig
from toolkit.data.corpus import LONGEST, split
from toolkit.data.text import prepare


def config(case: Case, folder: Path) -> RunConfig:
    case.write(folder / "text")
    if case.text:
        (folder / "text" / "x.txt").write_bytes(case.text.encode())
    data: dict[str, Any] = {
        "format": "text",
        "path": f"{folder}/text/*",
        "holdout": 0.0,
        "cache_dir": f"{folder}/cache",
    }
    return RunConfig.model_validate(
        {
            "task": {"objective": case.objective or "mlm_nsp"},
            "tokenizer": {"vocab_size": 100},
            "data": data | {"max_length": 64, "short_rate": 0.0} | (case.data or {}),
        }
    )


@pytest.mark.parametrize("case", cases("documents"))
def test_documents_are_found_or_what_hides_them_is_told(case: Case, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    with told(case):
        prepared = prepare(config(case, tmp_path))
        assert prepared.audit["documents"] == case.documents
        assert prepared.notes == [case.pairs] if case.pairs else True
        assert bool(warnings(prepared)) == bool(case.warning), warnings(prepared)
        for part in parts(case.warning):
            assert "\n" not in warnings(prepared)[0] and part in warnings(prepared)[0], warnings(prepared)


SENTENCES = {
    "zh": "今天天气很好。我们去公园玩吧！你觉得怎么样？他说：「好的。」",
    "ja": "今日は天気がいい。公園を散歩しました！猫は屋根で寝ていますか？",
    "hi": "राम घर गया। वह सो गया। क्या यह सच है? ",
    "ar": "الطقس جميل اليوم. هل أنت بخير؟ ذهبنا إلى الحديقة! ",
    "am": "ዛሬ አየሩ ጥሩ ነው። ወደ መናፈሻ ሄድን። ",
    "hy": "Այսօր եղանակը լավ է։ Գնացինք զբոսնելու։ ",
    "my": "ဒီနေ့ ရာသီဥတု ကောင်းတယ်။ ပန်းခြံကို သွားတယ်။ ",
    "en": "I met Mr. Smith at 3 p.m. today. Is it so? Yes! ",
}  # fmt: skip


@pytest.mark.parametrize("language", SENTENCES)
def test_a_paragraph_above_the_longest_is_cut_between_sentences(language: str) -> None:
    text = SENTENCES[language]
    times = 3 * LONGEST // len(text)
    assert split(text * times, language) == split(text, language) * times
    assert 2 <= len(split(text, language)) <= 4


def test_a_language_without_sentence_ends_is_cut_at_spaces() -> None:
    words = "วันนี้อากาศดี เราไปเดินเล่นที่สวน "
    assert " ".join(split(words * 500, "th")) == (words * 500).strip()
