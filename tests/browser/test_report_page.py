"""The report in a real browser: no error, no network, and its interactive parts answer."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("matplotlib", reason="needs the extra `eval`")

from evaluation.sample_report import sample_report
from peft_moe_delta.evaluation.page import write_report

SIZES = {"desktop": (1200, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    write_report(sample_report(), path := tmp_path_factory.mktemp("report"))
    return path


@pytest.fixture
def page(browser, folder):
    """The page, loaded anew from its file."""
    resize(browser, *SIZES["desktop"])
    browser.get_log("browser")
    browser.get((folder / "report.html").as_uri())
    return browser


def resize(browser, width, height, theme="light"):
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def select(page, name, text):
    from selenium.webdriver.support.ui import Select

    Select(page.find_element("id", name)).select_by_visible_text(text)


def test_it_loads_without_an_error_and_without_a_network(page):
    assert page.get_log("browser") == []
    assert page.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert page.title == "What the models gained and lost"


def test_a_cell_of_the_heat_map_says_its_share(page):
    from selenium.webdriver import ActionChains

    cells = page.find_elements("css selector", "#routing .cell")
    assert len(cells) == 4  # two layers, two experts
    ActionChains(page).move_to_element(cells[3]).perform()
    expected = "hu, layer 1, hungarian 1: 75.0% of 20 tokens; router entropy 0.40 bits"
    assert page.find_element("id", "routing-readout").text == expected
    page.execute_script("arguments[0].focus()", cells[0])
    assert page.find_element("id", "routing-readout").text.startswith("hu, layer 0, 0: 50.0%")


def test_tokens_wear_their_expert_and_say_their_probabilities(page):
    from selenium.webdriver import ActionChains

    select(page, "token-layer", "0")
    first, second = page.find_elements("css selector", "#tokens .token")
    assert first.value_of_css_property("border-bottom-color") != second.value_of_css_property("border-bottom-color")
    ActionChains(page).move_to_element(second).perform()
    assert page.find_element("id", "token-readout").text == "“és” in layer 0: 0 25.0%, hungarian 1 75.0%"
    select(page, "token-layer", "1")
    page.find_elements("css selector", "#tokens .token")[1].click()
    assert page.find_element("id", "token-readout").text == "“és” in layer 1: 0 0.0%, hungarian 1 100.0%"


def test_what_models_wrote_is_text_and_nothing_else(page):
    assert page.find_element("css selector", ".prompt").text == "Írj <b>"


def test_every_number_of_the_tables_is_in_the_json(page, folder):
    """Rounded to three digits, as they are shown."""
    known = set()

    def walk(value):
        if isinstance(value, dict | list):
            for part in value.values() if isinstance(value, dict) else value:
                walk(part)
        elif isinstance(value, int | float):
            known.add(format(abs(value), ".3f"))

    walk(json.loads((folder / "report.json").read_text(encoding="utf-8")))
    cells = page.find_elements("css selector", ".differences td, .scores td, .transfer td")
    numbers = [number for cell in cells for number in re.findall(r"\d+\.\d{3}", cell.text)]
    assert len(numbers) > 20
    assert set(numbers) <= known


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_it_fits_the_screen(page, screenshots, size, theme):
    resize(page, *SIZES[size], theme)
    width, height = page.execute_script(
        "const root = document.documentElement; return [root.scrollWidth, root.scrollHeight]"
    )
    assert width <= SIZES[size][0]
    resize(page, SIZES[size][0], height, theme)
    picture = screenshots / f"{size}-{theme}.png"
    assert page.save_screenshot(str(picture))
    print(f"screenshot: {picture}")
