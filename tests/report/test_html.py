"""The report in a real browser: no errors, the numbers of the records, sorting, filtering, three widths, print."""

import re
import shutil

import pytest
from results.made import THREE_SEEDS, record, table_records

from mora_repro.report import html, tables, verdicts
from mora_repro.spec.table import Cell

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install -e '.[dev]'")
By = pytest.importorskip("selenium.webdriver.common.by").By
WebDriverWait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="needs Chromium: apt-get install chromium chromium-driver",
    ),
]


@pytest.fixture(scope="module")
def view() -> tables.View:
    return tables.build("2", "mini", records())


def records():
    tries = [record(Cell("lora", 4, "uuid", "mini"), 100, [20] * 4, overrides=[f"lr={lr}"]) for lr in ("1e-3", "3e-3")]
    return [*table_records(THREE_SEEDS), *tries]


def page(view: tables.View) -> str:
    return html.page({"mini": [view]}, {"mini": verdicts.verdicts("mini", records())}, records())


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def opened(browser, view, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(page(view))
    browser.set_window_size(1400, 1000)
    browser.get(path.as_uri())
    return browser


def column(browser, index: int) -> list[str]:
    rows = browser.find_elements(By.CSS_SELECTOR, "#t-table2-mini tbody tr")
    return [row.find_elements(By.CSS_SELECTOR, "th, td")[index].text for row in rows if row.is_displayed()]


def test_the_console_is_empty_and_nothing_is_fetched(opened):
    assert [entry for entry in opened.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    fetched = opened.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in fetched if not name.startswith(("data:", "blob:"))] == []


def test_the_numbers_are_those_of_the_records(opened, view):
    for index, line in enumerate(view.lines):
        row = opened.find_elements(By.CSS_SELECTOR, "#t-table2-mini tbody tr")[index]
        shown = [cell.text for cell in row.find_elements(By.CSS_SELECTOR, "th, td")]
        assert shown[0] == line.name
        assert shown[3:7] == [tables.shown(entry) for entry in line.entries]
        assert shown[7:] == [tables.shown_paper(entry.paper) for entry in line.entries]
    assert opened.find_element(By.ID, "claim-memorisation_low-mini").text.count("holds") == 1


def test_a_number_opens_to_its_records(opened, view):
    number = opened.find_element(By.CSS_SELECTOR, "#t-table2-mini tbody td details summary")
    number.click()
    links = opened.find_elements(By.CSS_SELECTOR, "#t-table2-mini tbody td details[open] a")
    ids = [found.id for found in view.lines[0].results[0].records.values()]
    assert [link.text for link in links] == ids
    assert all(link.get_attribute("href").endswith(f"runs/{id_}.json") for link, id_ in zip(links, ids, strict=True))
    number.click()


def test_columns_sort_by_value_down_and_up_by_mouse_and_keyboard(opened):
    head = opened.find_element(By.CSS_SELECTOR, "#t-table2-mini thead tr:last-child th:nth-child(4)")
    head.find_element(By.TAG_NAME, "button").click()
    down = column(opened, 3)
    assert head.get_attribute("aria-sort") == "descending"
    assert down == sorted(down, key=lambda text: -float(text.split()[0])) and len(down) == 5
    head.find_element(By.TAG_NAME, "button").send_keys("\ue007")  # Enter
    assert head.get_attribute("aria-sort") == "ascending" and column(opened, 3) == down[::-1]


def test_the_filter_leaves_the_rows_that_have_the_word(opened):
    field = opened.find_element(By.CSS_SELECTOR, "input[data-filter='t-table2-mini']")
    field.send_keys("mora")
    assert sorted(column(opened, 0)) == ["MoRA r=32", "MoRA r=4"]
    field.send_keys("\ue003" * 4)  # Backspace
    assert len(column(opened, 0)) == 5


def test_curves_have_a_trace_per_row_with_hover(opened):
    traces = opened.execute_script(
        "return document.getElementById('figure3-mini').data.filter(t => t.showlegend !== false).map(t => t.name)"
    )
    assert traces == ["FFT", "LoRA r=4", "MoRA r=4", "LoRA r=32", "MoRA r=32"]
    assert opened.execute_script("return document.getElementById('search-uuid-mini').data[0].x") == [1e-3, 3e-3]


@pytest.mark.parametrize("width", [390, 820, 1400])
def test_nothing_is_wider_than_the_window(opened, width):
    opened.set_window_size(width, 900)
    sizes = "return [window.innerWidth, document.documentElement.scrollWidth]"
    WebDriverWait(opened, 10).until(lambda browser: (found := browser.execute_script(sizes))[1] <= found[0])
    opened.set_window_size(1400, 1000)


def test_what_a_screen_reader_needs_is_there(opened):
    assert opened.find_element(By.TAG_NAME, "html").get_attribute("lang") == "en"
    levels = [int(head.tag_name[1]) for head in opened.find_elements(By.CSS_SELECTOR, "h1, h2, h3")]
    assert levels[0] == 1 and levels.count(1) == 1
    for table in opened.find_elements(By.CSS_SELECTOR, "table"):
        region = table.find_element(By.XPATH, "..")
        assert region.get_attribute("aria-label") and region.get_attribute("tabindex") == "0"
    assert all(figure.get_attribute("aria-label") for figure in opened.find_elements(By.TAG_NAME, "figure"))
    ids = opened.execute_script("return [...document.querySelectorAll('main [id]')].map(found => found.id)")
    assert len(ids) == len(set(ids))
    anchors = [link.get_attribute("href") for link in opened.find_elements(By.CSS_SELECTOR, "nav a")]
    assert all(opened.find_elements(By.ID, anchor.partition("#")[2]) for anchor in anchors)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(opened, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    style = "const s = getComputedStyle(document.querySelector(arguments[0])); return [s.color, arguments[1]]"
    page = opened.execute_script("return getComputedStyle(document.body).backgroundColor")
    for selector in ("body", ".note", ".holds", ".does-not-hold", "nav a", "td.paper"):
        if opened.find_elements(By.CSS_SELECTOR, selector):
            ink, _ = opened.execute_script(style, selector, page)
            assert contrast(ink, page) >= 4.5, (selector, ink, page)


def contrast(first: str, second: str) -> float:
    """WCAG 2.1's contrast ratio of two CSS colours."""

    def luminance(colour: str) -> float:
        parts = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_the_same_records_give_the_same_bytes(view):
    assert page(view) == page(view)
