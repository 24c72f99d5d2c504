"""How long 65,000 responses take to be scored for language confusion: a benchmark of 13 languages x 5,000 prompts.

Responses are four lines each, in scripts with and without spaces; the ratio to plain language identification
of the same lines, taken in the same run, says what lines and words cost on top.
"""

from __future__ import annotations

import argparse
import time

from peft_moe_delta.evaluation import language_confusion
from peft_moe_delta.evaluation.identification import detect_language

RESPONSES, LIMIT_SECONDS = 65_000, 180
SENTENCES = {
    "hu": "Ma reggel elmentem a boltba friss kenyeret és tejet venni.",
    "ru": "Сегодня утром я пошёл в магазин, чтобы купить свежий хлеб.",
    "ar": "ذهبت هذا الصباح إلى السوق لشراء الخبز والحليب الطازج.",
    "zh": "今天早上我去商店买了新鲜的面包和牛奶。",
    "ja": "今朝、私は新鮮なパンと牛乳を買うためにお店に行きました。",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--responses", type=int, default=RESPONSES)
    each = parser.parse_args().responses // len(SENTENCES)
    print("| language | responses/s | times identification alone |\n|---|---:|---:|")
    total = 0.0
    for language, sentence in SENTENCES.items():
        responses = ["\n".join([f"{sentence} {number}"] * 4) for number in range(each)]
        started = time.perf_counter()
        score = language_confusion(responses, language)
        between = time.perf_counter()
        for response in responses:
            for line in response.splitlines():
                detect_language(line)
        seconds, alone = between - started, time.perf_counter() - between
        total += seconds
        assert score.counted.all()
        print(f"| {language} | {each / seconds:,.0f} | {seconds / alone:.2f} |")
    print(f"\n{each * len(SENTENCES):,} responses: {total:.0f} s (limit for {RESPONSES:,}: {LIMIT_SECONDS})")


if __name__ == "__main__":
    main()
