"""The report in a headless Chromium: it loads without errors, filters, answers to mouse and keyboard, and prints."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.support.synthetic import make_record
from wlora.cli import report
from wlora.storage.records import RecordStore

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not BROWSER or not DRIVER, reason="needs Chromium and chromedriver, as apt-get install chromium-driver"
    ),
]
QUIET = ("quic", "background-networking", "component-update", "sync", "gpu")
PATIENCE = 60  # seconds


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a study with something for every section."""
    results = tmp_path_factory.mktemp("study")
    store, label = RecordStore(results), np.arange(40) % 2
    names = [f"bert.encoder.layer.{layer}.attention.self.value" for layer in (3, 4)]
    kept = {
        "adapters": [{"name": name, "omega": 0.5, "rank": 8} for name in names],
        "events": [{"step": 10, "kind": "cut", "omega": dict.fromkeys(names, 0.5)}],
    }
    methods: tuple[tuple[str, list[str], float, dict[str, Any]], ...] = (
        ("lora", [], 0.80, {}),
        ("wlora", ["k=5"], 0.81, kept),
        ("rlora", ["k=5"], 0.76, kept),
    )
    for task in ("sst2", "rte"):
        for method, words, score, fields in methods:
            for lr, seeds in (("3e-4", [100]), ("1e-3", [0, 1, 2, 100])):
                for seed in seeds:
                    value = score + seed % 3 / 500 - (0.02 if lr == "3e-4" else 0)
                    own = [f"method={method}", f"task={task}", f"lr={lr}", f"seed={seed}", *words]
                    record = make_record(results, *own, metrics=value, **fields)
                    wrong = np.arange(40) < 40 * (1 - value)
                    table = pa.table({"label": label, "prediction": np.where(wrong, 1 - label, label)})
                    record.predictions = store.write_predictions(record.run_id, table)
                    store.write(record)
                    points = [{"step": step, "loss": 1 / step, "metrics": {"accuracy": value}} for step in (10, 20, 30)]
                    text = "".join(json.dumps(point) + "\n" for point in points)
                    store.path(record.run_id).with_suffix(".jsonl").write_text(text)
    make_record(results, "method=adalora", "task=sst2", status="diverged")
    for seed in (0, 1):
        record = make_record(
            results, "method=lora", "task=rte", f"seed={seed}", "targets=all", "model=smollm2_135m", metrics=0.7
        )
        record.config["model"]["path"] = "a/folder_with_a_long_name" * 4  # in the caption of Table 3
        store.write(record)
    report.main([f"results_dir={results}"])
    return results / "report.html"


class Reader:
    """Somebody who looks at a page."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def ask(self, script: str, *values: Any) -> Any:
        """Evaluate an expression in the page."""
        return self.driver.execute_script(f"return {script}", *values)

    def wait(self, condition: str) -> None:
        """Wait until an expression is true in the page."""
        from selenium.webdriver.support.wait import WebDriverWait

        WebDriverWait(self.driver, PATIENCE, 0.05).until(lambda _: self.ask(condition), condition)

    def see(self, section: str) -> None:
        """Scroll to a section and wait until it is drawn."""
        self.driver.execute_script("document.getElementById(arguments[0]).scrollIntoView({behavior: 'instant'})", section)
        self.wait(f"document.getElementById('{section}').dataset.drawn === 'yes'")

    def find(self, selector: str) -> Any:
        """Return the first element that matches."""
        return self.driver.find_element("css selector", selector)

    def errors(self) -> list[str]:
        """Return what the page reported as an error."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    profile = tmp_path_factory.mktemp("profile")
    for word in (
        "headless=new",
        "no-sandbox",
        "no-first-run",
        f"user-data-dir={profile}",
        *(f"disable-{one}" for one in QUIET),
    ):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    yield found
    found.quit()


@pytest.fixture
def read(driver: Any, page: Path) -> Callable[..., Reader]:
    """Return a function that opens the page, or another one, at a width in pixels."""

    def opened(width: int = 1280, page: Path = page) -> Reader:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get(page.as_uri())
        reader = Reader(driver)
        reader.wait("document.body.dataset.ready === 'yes'")
        return reader

    return opened


SECTIONS = ("claims", "cost", "curves", "rates", "adapters", "examples")


@pytest.mark.parametrize("width", [1280, 390])
def test_every_section_is_drawn_within_the_page(width: int, read: Callable[..., Reader]) -> None:
    reader = read(width)
    for name in SECTIONS:
        reader.see(name)
        reader.wait(f"document.querySelector('#{name} svg .mark-symbol, #{name} svg .mark-rect') !== null")
    widths = reader.ask("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert widths[0] == widths[1] <= width, "nothing is wider than the screen"
    assert reader.ask("document.querySelectorAll('#cost-charts figure').length") == 3, "one panel per task and model"
    assert reader.errors() == []


def test_the_same_two_methods_in_two_tables_have_two_marks(read: Callable[..., Reader], tmp_path: Path) -> None:
    for targets, tasks in (("qkv", ("sst2", "rte")), ("all", ("sst2",))):
        for task in tasks:
            for method, score in (("lora", 0.8), ("wlora", 0.7)):
                for seed in range(3):
                    words = [f"method={method}", f"task={task}", f"seed={seed}", f"targets={targets}"]
                    make_record(tmp_path, *words, *(["k=5"] if method == "wlora" else []), metrics=score + seed / 100)
    report.main([f"results_dir={tmp_path}"])
    reader = read(page=tmp_path / "report.html")
    reader.wait("document.querySelectorAll('#claims .mark-symbol path').length === 2")
    labels = reader.ask("[...document.querySelectorAll('#claims .role-axis-label text')].map((text) => text.textContent)")
    assert {"WLoRA K=5 vs LoRA · Table 1", "WLoRA K=5 vs LoRA · Table 2, SST-2"} <= set(labels)


def test_filters_change_the_list_and_the_charts(read: Callable[..., Reader]) -> None:
    reader = read()
    reader.see("cost")
    marks = "document.querySelectorAll('#cost-charts .mark-symbol path').length"
    reader.wait(f"{marks} === 7")
    assert reader.find("#count").text == "33 of 33 runs"
    reader.find(".facet:nth-of-type(1) summary").click()
    reader.find(".facet:nth-of-type(1) label").click()
    reader.wait("document.body.dataset.chartsMs")
    assert reader.find("#count").text == "16 of 33 runs" and reader.ask(marks) == 3
    reader.find("#search").send_keys("rlora")
    reader.wait("document.getElementById('count').textContent === '5 of 33 runs'")
    reader.find("#clear").click()
    reader.wait(f"{marks} === 7")
    assert reader.errors() == []


def test_the_list_is_sorted_by_keyboard_and_a_run_opens_with_its_command(read: Callable[..., Reader]) -> None:
    from selenium.webdriver.common.keys import Keys

    reader = read()
    button = reader.find("[data-sort=score]")
    button.send_keys(Keys.ENTER)
    assert reader.ask("document.querySelector('[aria-sort] button').dataset.sort") == "score"
    assert reader.ask("document.activeElement.dataset.sort") == "score", "the focus stays"
    scores = reader.ask(
        "[...document.querySelectorAll('#run-table tbody tr')].map((row) => Number(row.cells[5].textContent))"
    )
    assert len(scores) == 25 and scores == sorted(scores, reverse=True)
    reader.find("[data-run]").send_keys(Keys.ENTER)
    reader.wait("document.getElementById('detail').open")
    assert "python -m wlora.run" in reader.find("#detail pre").text
    reader.wait("document.querySelectorAll('#detail svg').length === 2")
    reader.ask("document.activeElement.id")
    reader.find("#detail .close").send_keys(Keys.ESCAPE)
    reader.wait("!document.getElementById('detail').open")
    assert reader.errors() == []


def test_a_mark_tells_its_run_and_command(read: Callable[..., Reader]) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    reader = read()
    reader.see("cost")
    reader.wait("document.querySelector('#cost-charts .mark-symbol path') !== null")
    ActionChains(reader.driver).move_to_element(reader.find("#cost-charts .mark-symbol path")).perform()
    reader.wait("document.querySelector('#vg-tooltip-element.visible') !== null")
    told = reader.find("#vg-tooltip-element").text
    assert "LoRA" in told and "python -m wlora.run" in told and "1e-3" in told
    reader.find("#cost-charts .mark-symbol path").click()
    reader.wait("document.getElementById('detail').open")


def test_axes_can_be_chosen(read: Callable[..., Reader]) -> None:
    reader = read()
    reader.see("cost")
    reader.driver.execute_script(
        "const one = document.getElementById('cost-x'); one.value = 'seconds'; one.dispatchEvent(new Event('change'))"
    )
    reader.wait("document.querySelector('#cost-charts svg').textContent.includes('training seconds')")
    assert reader.errors() == []


def test_the_switch_of_scores_shows_the_other_tables(read: Callable[..., Reader]) -> None:
    reader = read()
    parts = "[...document.querySelectorAll('#tables [data-score]')]"
    shown = f"{parts}.filter((one) => one.offsetHeight).map((one) => one.dataset.score)"
    assert reader.ask(shown) == ["last"]
    reader.find("#score label:nth-of-type(2)").click()
    assert reader.ask(shown) == ["best"]


def test_two_runs_are_compared_on_examples(read: Callable[..., Reader]) -> None:
    reader = read()
    reader.see("examples")
    reader.wait("document.querySelector('#example-result .cross') !== null")
    cells = reader.ask("[...document.querySelectorAll('.cross td')].slice(1).map((cell) => Number(cell.textContent))")
    assert sum(cells) == 40 and cells[3] > 0
    assert "McNemar's exact test: p" in reader.find("#example-result").text
    # The same p-value as Python's.
    assert reader.ask("mcnemar(3, 12)") == pytest.approx(0.03515625) and reader.ask("mcnemar(0, 0)") == 1


def test_the_page_prints_with_all_tables_and_charts(read: Callable[..., Reader]) -> None:
    reader = read()
    printed = base64.b64decode(reader.driver.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert printed.startswith(b"%PDF")
    assert reader.ask("[...document.querySelectorAll('section details')].every((one) => one.open)")
    assert reader.errors() == []
