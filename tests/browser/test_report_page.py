"""The report in a real browser, at the widths of a screen and of a phone, in light, dark and on paper: the verdict is
seen at once, nothing is cut off, no network, and the interactive parts answer. The reports are one with a row of every
kind, and the demo's, as its card has it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="needs the extra `eval`")

from evaluation.sample_report import sample_report
from peft_moe_delta.evaluation import EvalReport
from peft_moe_delta.evaluation.page import write_report

SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
DEMO = Path(__file__).parents[2] / "model_cards" / "smollm2-135m-hu-el"

# What sticks out of the screen outside a box that scrolls, what is clipped by its own box, and text of pictures that
# leaves them.
CUT_OFF = """
const found = [], wide = document.documentElement.clientWidth;
const told = (why, element) => found.push(why + ": " + element.tagName + " " + element.textContent.trim().slice(0, 40));
for (const element of document.querySelectorAll("main, main *")) {
  const box = element.getBoundingClientRect(), style = getComputedStyle(element);
  if (!box.width || element.closest("svg")) continue;
  const scrolls = element.parentElement.closest(".wide, pre");
  if (!scrolls && (box.right > wide + 1 || box.left < -1)) told("sticks out", element);
  const hides = !["visible", "auto", "scroll"].includes(style.overflowX) || style.textOverflow === "ellipsis";
  if (hides && element.scrollWidth > element.clientWidth + 1) told("is clipped", element);
}
for (const text of document.querySelectorAll("main svg text")) {
  const box = text.getBoundingClientRect(), picture = text.closest("svg").getBoundingClientRect();
  const inside = box.left > picture.left - 2 && box.right < picture.right + 2 && box.top > picture.top - 2;
  if (!inside || box.bottom > picture.bottom + 2)
    told("leaves its picture", text);
}
return found;
"""

# The contrast (WCAG) of text on its own background, the lowest of some elements.
CONTRAST = """
const numbers = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(n => colour.startsWith("color(") ? +n : n / 255);
const light = colour => numbers(colour).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
return Math.min(...[...document.querySelectorAll(arguments[0])].map(element => {
  const style = getComputedStyle(element);
  const [low, high] = [light(style.color), light(style.backgroundColor)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}));
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name -> folder of a report."""
    found = {}
    for name, report in (("sample", sample_report()), ("demo", EvalReport.load(DEMO))):
        write_report(report, folder := tmp_path_factory.mktemp(name))
        found[name] = folder
    return found


@pytest.fixture
def folder(folders):
    return folders["sample"]


@pytest.fixture
def page(browser, folder):
    """The sample's page, loaded anew from its file."""
    return opened(browser, folder)


VIEWS = [(name, size, theme) for name in ("sample", "demo") for size in SIZES for theme in ("light", "dark")]


@pytest.fixture(params=VIEWS, ids="-".join)
def view(request, browser, folders):
    """A page as it is seen on one screen: the browser, and the view's name."""
    name, size, theme = request.param
    return opened(browser, folders[name], *SIZES[size], theme), "-".join(request.param)


def opened(browser, folder, width=1280, height=800, theme="light", media="screen"):
    resize(browser, width, height, theme, media)
    browser.get_log("browser")
    browser.get((folder / "report.html").as_uri())
    return browser


def resize(browser, width, height, theme="light", media="screen"):
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})


def select(page, name, text):
    from selenium.webdriver.support.ui import Select

    Select(page.find_element("id", name)).select_by_visible_text(text)


def box_of(page, selector):
    """Left, top, right and bottom of an element, on the screen."""
    script = "const b = document.querySelector(arguments[0]).getBoundingClientRect(); "
    return page.execute_script(script + "return [b.left, b.top, b.right, b.bottom]", selector)


def test_it_loads_without_an_error_and_without_a_network(page):
    assert page.get_log("browser") == []
    assert page.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert page.title == "What ours gained and kept"


def test_the_verdict_is_seen_without_scrolling_and_warnings_stand_before_it(view):
    page, _ = view
    left, top, right, bottom = box_of(page, "#verdict")
    width, height = page.execute_script("return [innerWidth, innerHeight]")
    assert left >= 0 and top >= 0 and right <= width and bottom <= height
    assert box_of(page, ".doubt")[3] <= top
    statements = page.find_elements("css selector", "#verdict li")
    assert len(statements) >= 4 and all(statement.is_displayed() for statement in statements)


def test_nothing_is_cut_off(view, screenshots):
    page, name = view
    width, scroll_width, height = page.execute_script(
        "const root = document.documentElement; return [root.clientWidth, root.scrollWidth, root.scrollHeight]"
    )
    assert scroll_width <= width
    assert page.execute_script(CUT_OFF) == []
    _, size, theme = name.split("-")
    for part, tall in (("first", SIZES[size][1]), ("whole", height)):
        resize(page, SIZES[size][0], tall, theme)
        picture = screenshots / f"{name}-{part}.png"
        assert page.save_screenshot(str(picture))
        print(f"screenshot: {picture}")


def test_words_and_numbers_on_colours_can_be_read(view):
    page, name = view
    judged = ", ".join(f".differences .{judgement}" for judgement in ("better", "kept", "worse"))
    assert page.execute_script(CONTRAST, f"#verdict li, {judged}") >= 4.5
    if name.startswith("sample"):
        assert page.execute_script(CONTRAST, "#routing .cell") >= 4.5


def test_dark_is_another_set_of_colours(browser, folders):
    seen = {}
    for theme in ("light", "dark"):
        page = opened(browser, folders["demo"], *SIZES["phone"], theme)
        elements = [page.find_element("css selector", css) for css in ("body", "#verdict .better", "#verdict .kept")]
        seen[theme] = [e.value_of_css_property(p) for e in elements for p in ("color", "background-color")]
    assert all(light != dark for light, dark in zip(*seen.values(), strict=True))


def test_colours_are_those_of_the_intervals(page):
    found = {
        li.text.split("\n")[0]: li.get_attribute("class") for li in page.find_elements("css selector", "#verdict li")
    }
    assert found == {
        "▲ Hungarian −22% bits": "better",
        "= English kept": "kept",
        "▼ sorting −5.0 points": "worse",
        "99% of English tokens on expert 0": "",
    }


def test_the_selector_changes_what_is_subtracted(page):
    def shown():
        tables = page.find_elements("css selector", ".differences")
        return [table.text.split("\n")[0] for table in tables if table.is_displayed()]

    assert shown() == ["minus post-trained"]
    select(page, "reference", "base")
    assert shown() == ["minus base"]
    cells = page.find_elements("css selector", ".comparison:not([hidden]) tbody td")
    assert cells[0].text.split("\n") == ["-0.750", "[-0.800, -0.700]", "▲ better"]


def test_paper_shows_every_comparison(browser, folders, screenshots):
    page = opened(browser, folders["demo"], 794, 1123, "dark", media="print")
    tables = page.find_elements("css selector", ".differences")
    assert len(tables) == 4 and all(table.is_displayed() for table in tables)
    assert not page.find_element("id", "reference").is_displayed()
    assert page.execute_script(CUT_OFF) == []
    paper = page.find_element("css selector", "body").value_of_css_property("background-color")
    assert paper == "rgba(255, 255, 255, 1)"
    resize(page, 794, page.execute_script("return document.documentElement.scrollHeight"), "dark", media="print")
    picture = screenshots / "paper.png"
    assert page.save_screenshot(str(picture))
    print(f"screenshot: {picture}")


def test_a_cell_of_the_heat_map_says_its_share(page):
    from selenium.webdriver import ActionChains

    cells = page.find_elements("css selector", "#routing .cell")
    # Two languages, two layers, two experts.
    assert " ".join(cell.text for cell in cells) == "50 50 25 75 100 0 100 0"
    heads = page.find_elements("css selector", "#routing thead th")
    assert [head.text for head in heads] == ["expert 0", "hungarian"] * 2
    ActionChains(page).move_to_element(cells[3]).perform()
    expected = "Hungarian, layer 1, hungarian: 75.0% of 20 tokens; router entropy 0.40 bits"
    assert page.find_element("id", "routing-readout").text == expected
    page.execute_script("arguments[0].focus()", cells[0])
    assert page.find_element("id", "routing-readout").text.startswith("Hungarian, layer 0, expert 0: 50.0%")


def test_tokens_wear_their_expert_and_say_their_probabilities(page):
    from selenium.webdriver import ActionChains

    select(page, "token-layer", "0")
    first, second = page.find_elements("css selector", "#tokens .token")
    assert first.value_of_css_property("border-bottom-color") != second.value_of_css_property("border-bottom-color")
    ActionChains(page).move_to_element(second).perform()
    assert page.find_element("id", "token-readout").text == "“és” in layer 0: expert 0 25.0%, hungarian 75.0%"
    select(page, "token-layer", "1")
    page.find_elements("css selector", "#tokens .token")[1].click()
    assert page.find_element("id", "token-readout").text == "“és” in layer 1: expert 0 0.0%, hungarian 100.0%"


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
    cells = page.find_elements("css selector", ".differences td, .scores td, .transfer td, .verdict small")
    numbers = [number for cell in cells for number in re.findall(r"\d+\.\d{3}", cell.text)]
    assert len(numbers) > 20
    assert set(numbers) <= known
