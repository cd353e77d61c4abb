"""The page: self-contained, escaped, complete with records and quiet without."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from wideberth.checks import InputError
from wideberth.reports import write_report
from wideberth.runs import Run

HOSTILE = "<script>alert('x')</script> & \"$\\frac{_\u0007"


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, and the text outside of styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        assert not self.open, f"unclosed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data

    def attributes(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def _page(runs: list[Run], tmp_path: Path, title: str | None = None) -> tuple[str, Page]:
    out = tmp_path / "pages" / "report.html"
    assert write_report(runs, out, title) == out
    assert [file.name for file in out.parent.iterdir()] == ["report.html"]
    html = out.read_text(encoding="utf-8")
    return html, Page(html)


@pytest.fixture
def unsaved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn but not rendered to files: quicker, where a test does not look into them."""
    monkeypatch.setattr("wideberth.reports.html.data_uri", lambda figure: "data:image/svg+xml;base64,")


@pytest.fixture(scope="module")
def six_page(six_paths: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    return _page([Run(path) for path in six_paths], tmp_path_factory.mktemp("six"))


def _embedded(page: Page) -> list[bytes]:
    return [base64.b64decode(image["src"].partition("base64,")[2]) for image in page.attributes("img")]


def test_nothing_outside_the_file_is_named(six_page: tuple[str, Page]) -> None:
    html, page = six_page
    assert "://" not in html
    for drawing in _embedded(page):
        assert not re.search(rb"https?://", re.sub(rb'xmlns(:\w+)?="[^"]*"', b"", drawing))
    assert not page.attributes("script")
    assert all(link["href"].startswith(("#", "data:")) for link in page.attributes("a") + page.attributes("link"))
    assert "default-src 'none'" in html


def test_all_sections_of_six_runs(six_page: tuple[str, Page]) -> None:
    _, page = six_page
    sections = [section["id"] for section in page.attributes("section")]
    assert sections == [
        "results", "trade-off", "margins", "radii", "extremes", "training", "protocol", "configuration",
    ]  # fmt: skip
    assert {link["href"] for link in page.attributes("a")} == {f"#{section}" for section in sections}
    # trade-off, three on margins, two runs with learned radii, the extremes of both, three on training
    assert len(page.attributes("img")) == 1 + 3 + 2 + 2 + 3
    assert len(page.attributes("details")) == 6


def test_headline_says_what_was_measured(six_page: tuple[str, Page]) -> None:
    text = " ".join(six_page[1].text.split())
    assert (
        "IAAT + EMR has the highest robust accuracy of 6 runs: 77.2% of 360 test samples of digits "
        "(95% interval 72.9 to 81.5) stay correctly classified under adversarial \N{SCRIPT SMALL L}∞ perturbations "
        "of size up to 0.1, searched by the standard suite (APGD-CE, APGD-T, FAB-T, Square). Unperturbed, 96.4% are."
    ) in text
    assert "torch 2.11.0" in text
    assert "FAB-T(steps=100)" in text
    assert "InstanceAdaptive(eps=0.1)" in text


def test_accessible(six_page: tuple[str, Page]) -> None:
    html, page = six_page
    assert page.attributes("html") == [{"lang": "en"}]
    assert all(len(image["alt"]) > 30 for image in page.attributes("img"))
    assert all("width" in image and "height" in image for image in page.attributes("img"))
    assert all(header["scope"] in ("row", "col") for header in page.attributes("th"))
    assert len(page.attributes("h1")) == 1
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


@pytest.mark.usefixtures("unsaved")
def test_one_run(iaat: Run, tmp_path: Path) -> None:
    _, page = _page([iaat], tmp_path)
    assert "trade-off" not in [section["id"] for section in page.attributes("section")]
    text = " ".join(page.text.split())
    assert text.startswith("IAAT IAAT 71.4% of 360 test samples of digits")
    assert "Bold" not in text
    assert "What differs" not in text


def test_hostile_names_are_only_text(altered: Callable[..., Run], six: list[Run], tmp_path: Path) -> None:
    run = altered(3, config={"name": HOSTILE, "note": "</pre><img src=x onerror=alert(1)>"})
    html, page = _page([run, six[0]], tmp_path, title=HOSTILE)
    assert not page.attributes("script")
    assert all(image["src"].startswith("data:image/") for image in page.attributes("img"))
    assert "<script" not in html
    assert "\u0007" not in html
    assert HOSTILE.replace("\u0007", "\ufffd") in page.text
    for drawing in _embedded(page):
        ElementTree.fromstring(drawing)
    drawn = b"".join(_embedded(page))
    assert b"<script" not in drawn
    assert b"&lt;script&gt;" in drawn


@pytest.mark.usefixtures("unsaved")
@pytest.mark.parametrize(
    "dropped",
    [
        ("config.yaml",),
        ("metrics.csv",),
        ("evaluation.json",),
        ("evaluation.parquet",),
        ("radii.parquet", "samples.parquet"),
        ("extremes.npz",),
        ("*.*",),
    ],
)
def test_missing_records_leave_their_sections_out(
    altered: Callable[..., Run], tmp_path: Path, dropped: tuple[str, ...]
) -> None:
    _, page = _page([altered(3, drop=dropped)], tmp_path)
    sections = {section["id"] for section in page.attributes("section")}
    gone = {
        "config.yaml": "configuration", "metrics.csv": "training", "evaluation.json": "protocol",
        "radii.parquet": "radii", "extremes.npz": "extremes",
    }  # fmt: skip
    assert gone.get(dropped[0]) not in sections
    assert "results" in sections
    if dropped == ("*.*",):
        assert sections == {"results"}


@pytest.mark.usefixtures("unsaved")
def test_a_run_without_evaluation_says_so(altered: Callable[..., Run], tmp_path: Path) -> None:
    _, page = _page([altered(3, drop=("evaluation.*",))], tmp_path)
    assert "Not evaluated yet" in page.text


@pytest.mark.usefixtures("unsaved")
def test_sparse_evaluation(altered: Callable[..., Run], tmp_path: Path) -> None:
    run = altered(3, drop=("evaluation.json",))
    (run.path / "evaluation.json").write_text('{"clean_accuracy": 0.9, "robust_accuracy": 0.5}')
    _, page = _page([run], tmp_path)
    assert "50.0% of the samples stay correctly classified under adversarial perturbations." in page.text


@pytest.mark.usefixtures("unsaved")
def test_different_protocols_are_not_ranked(six: list[Run], altered: Callable[..., Run], tmp_path: Path) -> None:
    _, page = _page([six[0], altered(2, evaluation={"eps": 0.2})], tmp_path)
    assert "evaluated by 2 different protocols" in page.text
    assert "highest robust accuracy" not in page.text
    assert "Where the runs were measured differently" in page.text


@pytest.mark.usefixtures("unsaved")
def test_samples_that_are_no_images_leave_a_note(altered: Callable[..., Run], tmp_path: Path) -> None:
    run = altered(3)
    records = run.extremes
    assert records is not None
    for kind in ("small", "large"):
        records[f"{kind}_x"] = records[f"{kind}_x"].reshape(16, 64)
    np.savez(run.path / "extremes.npz", **records)
    _, page = _page([run], tmp_path)
    assert "are not images" in page.text


def test_refusals(iaat: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one run"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(InputError, match="is a directory"):
        write_report([iaat], tmp_path)
