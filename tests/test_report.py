"""The page of an evaluation: whole, escaped, by itself, and true to its rows."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

import tokred
from tokred.measure import results
from tokred.measure.evaluation import Evaluation, Row, Speed
from tokred.measure.profile.values import LayerTimes
from tokred.measure.race import Arm
from tokred.measure.results import Result
from tokred.show import charts, evaluations, markup, report
from tokred.show.charts import Point

HOSTILE = '<img src=x onerror=alert(1)> & "co\'s"'
VOID = {"meta", "img", "br", "hr", "link", "input"}


def row(method: str, keep: float | None, top1: float, images_per_second: float) -> Row:
    dense = Speed(100.0, 0.010, 4e9, 8 * 2**20)
    speed = Speed(images_per_second, 1 / images_per_second, 2e9, None)
    reduced = keep is not None
    return Row(
        method=method,
        keep_rate=keep,
        code=f'tokred.apply(model, "{method}", keep_rate={keep})' if reduced else "",
        tokens=196,
        counts=(196, 98, 98, 49),
        images=400,
        metrics={"top1": top1, "top5": top1 + 1},
        compared=256,
        agreement=97.5,
        kl=0.0123,
        cosine=0.9876,
        depth_error=None,
        speed=speed,
        dense=dense,
        limit=Speed(250.0, 0.004, 2e9, None) if reduced else None,
    )


def evaluation(**changes: object) -> Evaluation:
    rows = (
        row("dense", None, 94.5, 100.0),
        row("tome", 0.7, 94.1, 140.0),
        row("tome", 0.5, 88.25, 210.0),
        row("atc", 0.7, 94.4, 120.0),
        row(HOSTILE, 0.5, 60.0, 180.0),
    )
    made = Evaluation(
        "digits", "flowers/val", "classification", "top1", True, "%", "cpu", "float32", 1, 8,
        {"torch": "2.15"}, rows, {"svit": "needs <gates>"},
    )  # fmt: skip
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def profiled() -> tokred.Profile:
    one = LayerTimes(0, 196, 196, 0.003, 0.0, 0.0, 0.0, 0.0, 0.003, 0.003)
    two = LayerTimes(1, 196, 98, 0.002, 0.004, 0.001, 0.0, 0.0, 0.003, 0.002)
    arms = [Arm((seconds,), None) for seconds in (0.006, 0.010, 0.005, 0.010)]
    return tokred.Profile(
        "ViT", f"Method({HOSTILE})", "between", True, 196, (one, two), 0.0, 8, (56, 56), "cpu",
        "float32", 1, {"torch": "2.15"}, *arms,
    )  # fmt: skip


@dataclass(frozen=True)
class Advised:
    code: str = 'tokred.apply(model, "atc", tokred.Exactly((196, 90)))'
    sentences: tuple[str, ...] = ("Take atc: 1.52x as fast.",)


class Tags(HTMLParser):
    """Checks that tags are balanced, and keeps cells and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[list[str]] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.cells[-1][-1] += data
        self.text += data


def parsed(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    tags.close()
    assert tags.open == []
    return tags


@pytest.fixture(scope="module")
def page() -> str:
    strip = Image.new("RGB", (40, 20), "red")
    return report.html(
        evaluation(), profile=profiled(), pictures=[(HOSTILE, strip)], advice=Advised()
    )


@dataclass(frozen=True)
class Bare(Result):
    """A result that nobody draws."""


def test_what_nobody_draws_shows_as_text() -> None:
    assert Bare()._repr_html_() is None, "so that notebooks print it"
    with pytest.raises(TypeError, match=r"no plot is registered for Bare: import tokred\.show"):
        results.drawn(Bare(), "plot")


def test_a_subclass_is_drawn_as_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(Evaluation):
        pass

    table = evaluation()
    mine = Mine(**{field.name: getattr(table, field.name) for field in dataclasses.fields(table)})
    assert mine._repr_html_() == table._repr_html_()
    monkeypatch.setattr(results, "_FUNCTIONS", {**results._FUNCTIONS})
    results.draws(Mine, "html")(lambda result: f"<p>{result.model}</p>")
    assert mine._repr_html_() == "<p>digits</p>" != table._repr_html_()


def test_every_setting_is_in_it_with_its_figures(page: str) -> None:
    tags = parsed(page)
    (titles,) = [cells for cells in tags.cells if cells[0] == "setting"]
    rows = [cells for cells in tags.cells if len(cells) == len(titles)]
    by_name = {cells[0]: dict(zip(titles, cells, strict=True)) for cells in rows}
    table = evaluation()
    for given in table.rows:
        told = by_name[given.name]
        assert told["top1"] == f"{given.metrics['top1']:.2f}"
        assert told["top5"] == f"{given.metrics['top5']:.2f}"
        assert told["images/s"] == f"{given.speed.images_per_second:.1f}"
        assert told["speed-up"] == f"{given.speed_up:.2f}x"
        assert told["latency, ms"] == f"{1e3 * given.speed.latency:.2f}"
        assert told["tokens"] == "196 → 98 → 49"
    tome = by_name["tome 0.5"]
    assert tome["change"] == "-6.25" and tome["of free limit"] == "84%"
    assert (tome["agreement, %"], tome["KL"], tome["cosine"]) == ("97.50", "0.0123", "0.9876")
    assert tome["G multiply-adds"] == "2.000"
    assert "memory, MiB" not in titles and "depth error, %" not in titles, "nothing is in them"
    front = {name for name, line in re.findall(r'"marked"><th[^>]*><strong[^>]*>([^<]*)(<)', page)}
    assert front == {r.name for r in table.front()}


def test_the_headline_says_what_to_take() -> None:
    tags = parsed(report.html(evaluation()))
    assert "On flowers/val, the dense model has top1 94.50% at 100.0 images/s" in tags.text
    assert "At most 0.5 points lost: tome 0.7, 1.40x as fast (top1 -0.40;" in tags.text
    assert 'tokred.apply(model, "tome", keep_rate=0.7)' in tags.text
    assert "svit: needs <gates>" in tags.text
    slow = evaluation(rows=(evaluation().dense, row("tome", 0.5, 88.0, 50.0)))
    assert "At most 2 points lost: none of the settings that were tried" in report.html(slow)
    assert "<pre" not in report.html(slow), "there is nothing to paste"


def test_advice_is_told_in_place_of_the_headline(page: str) -> None:
    tags = parsed(page)
    assert "Take atc: 1.52x as fast." in tags.text
    (pasted,) = re.findall("<pre.*?<code>(.*?)</code>", page)
    assert unescape(pasted) == Advised.code
    assert "points lost" not in tags.text
    nothing = report.html(evaluation(), advice=Advised("", ("Nothing helps.",)))
    assert "Nothing helps." in nothing and "<pre" not in nothing


def test_settings_of_one_name_are_numbered() -> None:
    table = evaluation()
    several = [dataclasses.replace(row, keep_rate=None, method="atc") for row in table.settings]
    head, rows = evaluations.columns(dataclasses.replace(table, rows=(table.dense, *several)))
    assert [cells[0] for cells in rows] == ["dense", "atc (1)", "atc (2)", "atc (3)", "atc (4)"]
    assert [cells[head.index("code")] for cells in rows[1:]] == [row.code for row in several]


def test_without_labels_closeness_leads() -> None:
    table = evaluation(leading="agreement", task="unlabelled")
    rows = [
        dataclasses.replace(row, metrics={}, agreement=100.0 if not row.code else 99.5 - 10 * at)
        for at, row in enumerate(table.rows)
    ]
    table = dataclasses.replace(table, rows=tuple(rows))
    head, cells = evaluations.columns(table)
    assert head[2] == "agreement" and "agreement, %" not in head and "top1" not in head
    assert [row[2] for row in cells] == ["100.00", "89.50", "79.50", "69.50", "59.50"]
    text = parsed(report.html(table)).text
    assert "there are no labels" in text and "measured on 256 images" in text
    assert "At most 2 points lost: none" in text


def test_names_cannot_break_out(page: str) -> None:
    assert "<img src=x" not in page and "<gates>" not in page
    tags = parsed(page)
    assert f"{HOSTILE} 0.5" in tags.text and f"Method({HOSTILE})" in tags.text
    (alt,) = [value for tag, name, value in tags.attributes if (tag, name) == ("img", "alt")]
    assert alt == f"{HOSTILE}: an image, then its tokens after each reduction"
    assert not any(name.startswith("on") for _, name, _ in tags.attributes)


def test_nothing_is_fetched(page: str) -> None:
    assert "http://" not in page and "https://" not in page
    assert "url(" not in page and "@import" not in page
    for _, name, value in parsed(page).attributes:
        if name in ("src", "href", "data", "srcset"):
            assert value is not None and value.startswith("data:image/png;base64,")
            image = Image.open(io.BytesIO(base64.b64decode(value.split(",")[1])))
            assert image.size == (40, 20)


def test_the_page_is_for_both_themes_small_screens_and_paper(page: str) -> None:
    assert "@media (prefers-color-scheme:dark)" in page and "color-scheme:light dark" in page
    assert "@media print" in page and "@media (max-width:600px)" in page
    assert 'name="viewport" content="width=device-width' in page
    inks = set(re.findall(r"<text[^>]*fill=", page))
    assert not inks, "words are in the colour of the text around them"


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2 defines it."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("colour", sorted({*charts.COLOURS, *charts.PART_COLOURS}))
def test_series_can_be_seen_on_light_and_dark(colour: str) -> None:
    papers = re.findall(r"--paper:(#[0-9a-f]{6})", report._STYLE)
    assert len(papers) == 2
    for paper in papers:
        low, high = sorted((luminance(colour), luminance(paper)))
        assert (high + 0.05) / (low + 0.05) >= 3


def drawn(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg[: svg.index("</svg>") + len("</svg>")])


def test_the_plot_has_every_point_where_it_belongs() -> None:
    svg = drawn(evaluations.plot(evaluation()))
    at = {}
    for group in svg.iter("g"):
        title, path = group.findtext("title"), group.find("path")
        assert title is not None and path is not None
        x, y = re.findall(r"[\d.]+", path.attrib["transform"])[:2]
        at[title.split(":")[0]] = (float(x), float(y), path.attrib["d"])
    table = evaluation()
    assert at.keys() == {r.name for r in table.rows}
    for one in table.rows:
        for other in table.rows:
            if one.speed_up > other.speed_up:
                assert at[one.name][0] > at[other.name][0]
            if table.score(one) > table.score(other):
                assert at[one.name][1] < at[other.name][1], "better is higher"
    shapes = {r.method: at[r.name][2] for r in table.rows}
    assert len(set(shapes.values())) == 4, "every method has a shape of its own"


def test_what_is_no_number_is_left_out_of_the_plot_and_told() -> None:
    table = evaluation()
    nan = row("atc", 0.5, float("nan"), 130.0)
    endless = row("tome", 0.3, float("inf"), 230.0)
    html = report.html(dataclasses.replace(table, rows=(*table.rows, nan, endless)))
    titles = re.findall(r"<title>([^<:]*):", html)
    assert "tome 0.5" in titles and "atc 0.5" not in titles and "tome 0.3" not in titles
    assert "NaN" not in html and "Not drawn, because they are no numbers: 2" in html
    assert ">nan<" in html, "the table has them"
    nothing = Point(float("nan"), float("nan"), "", "")
    assert "<svg" not in charts.scatter({"one": [nothing]}, [], nothing, "x", "y")


def test_changes_of_small_metrics_have_their_digits() -> None:
    table = evaluation(leading="rel", higher_is_better=False, unit="")
    rows = [dataclasses.replace(r, metrics={"rel": r.metrics["top1"] / 1e4}) for r in table.rows]
    head, cells = evaluations.columns(dataclasses.replace(table, rows=tuple(rows)))
    assert [row[head.index("change")] for row in cells[1:3]] == ["-0.0000", "-0.0006"]


def test_the_same_setting_is_named_once() -> None:
    table = evaluation()
    told = parsed(report.html(dataclasses.replace(table, rows=table.rows[:2]))).text
    assert (
        "At most 0.5 points lost: tome 0.7" in told and "At most 2 points lost: the same." in told
    )


def test_less_is_better_is_drawn_the_right_way_up() -> None:
    table = evaluation(leading="rel", higher_is_better=False, unit="")
    rows = [dataclasses.replace(r, metrics={"rel": r.metrics["top1"] / 100}) for r in table.rows]
    svg = drawn(evaluations.plot(dataclasses.replace(table, rows=tuple(rows))))
    heights = [
        float(re.findall(r"[\d.]+", path.attrib["transform"])[1])
        for group in svg.iter("g")
        if (path := group.find("path")) is not None
    ]
    assert heights[-1] == max(heights), "the dense model has most of it, and stands lowest"


def test_labels_do_not_touch() -> None:
    points = [Point(1 + n / 50, 90 + n / 40, "", f"a long name {n}") for n in range(12)]
    svg = drawn(charts.scatter({"one": points}, points, Point(1, 91, "", "dense"), "x", "y"))
    boxes = []
    for text in svg.iter("text"):
        if "transform" in text.attrib or not (text.text or "").startswith("a long"):
            continue
        wide = 0.5 * 19 * len(text.text or "")
        left = (
            float(text.attrib["x"])
            - {"start": 0, "middle": wide / 2, "end": wide}[text.attrib["text-anchor"]]
        )
        top = float(text.attrib["y"]) - 14
        assert left >= 0 and left + wide <= 560
        boxes.append((left, top, left + wide, top + 16))
    assert len(boxes) > 2
    for number, one in enumerate(boxes):
        for other in boxes[:number]:
            apart = one[0] >= other[2] or other[0] >= one[2]
            assert apart or one[1] >= other[3] or other[1] >= one[3]


def test_numbers_of_an_axis_have_equally_many_digits_and_room() -> None:
    assert charts._told([94.0, 94.25, 94.5]) == ["94.00", "94.25", "94.50"]
    assert charts._told([1.0, 2.0]) == ["1", "2"] and charts._told([0.0, 1e6]) == ["0", "1e+06"]
    points = [Point(1 + n / 50, n / 1e4, "") for n in range(12)]
    svg = drawn(charts.scatter({"one": points}, points, points[0], "x", "y"))
    for text in svg.iter("text"):
        if text.attrib["text-anchor"] == "end":
            assert float(text.attrib["x"]) - 0.5 * 19 * len(text.text or "") > 20, "beside its name"


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.7, 3.2], [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]),
        ([5.0, 5.0], [4.0, 5.0, 6.0]),
        ([0.0, 0.0], None),
        ([100.0, 100.0], None),
    ],
)
def test_ticks_are_round_and_around(values: list[float], ticks: list[float] | None) -> None:
    found = charts._ticks(values)
    assert ticks is None or found == ticks
    assert found[0] <= min(values) and found[-1] >= max(values) and len(set(found)) > 1


def test_bars_add_up_to_the_block() -> None:
    html = profiled()._repr_html_()
    (svg,) = re.findall(r'<svg viewBox="0 0 560.*?</svg>', html)
    heights = {
        group.findtext("title", "").split(",")[0]
        + group.findtext("title", "").split(",")[1]: float(bar.attrib["height"])
        for group in drawn(svg).iter("g")
        if (bar := group.find("rect")) is not None
    }
    heights = {name.split(":")[0]: height for name, height in heights.items()}
    stacked = sum(heights[f"layer 1 {part}"] for part in ("block", "matching", "merging"))
    assert stacked / heights["layer 1 dense"] == pytest.approx(7 / 3, abs=0.01)
    (loss,) = profiled().losses()
    assert loss in parsed(html).text


def test_a_line_of_one_point_is_not_in_the_legend() -> None:
    slow = evaluation(rows=(evaluation().dense, row("tome", 0.5, 95.0, 150.0)))
    assert len(slow.front()) == 1
    told = "no setting is both faster and better</li>"
    assert told not in evaluations.plot(slow) and told in evaluations.plot(evaluation())


def test_many_losses_are_folded() -> None:
    one = profiled().layers[1]
    layers = [dataclasses.replace(one, layer=n, before=196 - n, after=195 - n) for n in range(12)]
    result = dataclasses.replace(profiled(), layers=tuple(layers))
    shown, folded = result._repr_html_().split("<details><summary>7 more</summary>")
    assert len(result.losses()) == 12
    assert escape(result.losses()[4]) in shown and escape(result.losses()[5]) in folded
    assert "7 more layers cost more than they save" in str(result)


def test_what_scrolls_can_be_reached_and_has_a_name(page: str) -> None:
    boxes = re.findall(r'<div class="scroll"([^>]*)>', page)
    assert len(boxes) == 3
    assert all('tabindex="0" role="group" aria-label="' in each for each in boxes)


def test_pieces_for_notebooks_are_balanced_and_bring_their_style() -> None:
    for piece in (evaluation()._repr_html_(), profiled()._repr_html_()):
        parsed(piece)
        assert piece.startswith('<div class="tokred"><style>')
        assert "background:var(--paper)" not in piece, "the ground is the notebook's"
    assert "Where the time goes" in report.html(None, profile=profiled())
    with pytest.raises(ValueError, match="evaluation must be given, or profile"):
        report.html(None)


def test_rows_must_fit_the_head() -> None:
    with pytest.raises(ValueError, match="row 1 must have 2 cells, as the head, not 3"):
        markup.table(["a", "b"], [["1", "2"], ["1", "2", "3"]])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no browser")
@pytest.mark.parametrize("wide", [390, 1200])
def test_a_browser_shows_it_in_both_themes_without_scrolling_sideways(
    page: str, tmp_path: Path, wide: int
) -> None:
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               "--window-size=1200,1200"]  # fmt: skip
    # In a frame, because windows have a least width, which is more than a phone's.
    file = tmp_path / "frame.html"
    file.write_text(
        f'<body style="margin:0"><iframe id="shown" style="border:0;width:{wide}px;height:1200px" '
        f'srcdoc="{escape(page)}"></iframe><script>onload = () => {{ const it = '
        "shown.contentDocument.documentElement; document.title = [it.clientWidth, it.scrollWidth]"
        ".join(' ') }</script>"
    )
    dom = subprocess.run([*browser, "--dump-dom", file.as_uri()], capture_output=True, text=True)
    (sizes,) = re.findall(r"<title>(\d+ \d+)</title></head>", dom.stdout)
    assert sizes == f"{wide} {wide}"
    grounds = []
    for theme in (0, 1):  # dark, light
        shot = tmp_path / f"{theme}.png"
        preferred = f"--blink-settings=preferredColorScheme={theme}"
        subprocess.run(
            [*browser, preferred, f"--screenshot={shot}", file.as_uri()],
            capture_output=True,
            check=True,
        )
        image = Image.open(shot).convert("L").crop((0, 0, wide, 1200))
        grounds.append(image.getpixel((2, 2)))
        low, high = image.getextrema()
        assert high - low > 150, "something is written on it"  # type: ignore[operator]
    assert grounds[0] < 50 and grounds[1] > 200


CLICKS = """<script>
document.querySelectorAll(".sortable th[scope=col]").forEach((title, number) => {
  const told = [];
  for (let n = 0; n < 2; n++) {
    title.querySelector("button").click();
    told.push([...document.querySelectorAll(".sortable tbody tr")].map(
      row => row.cells[number].textContent).join("|") + "#" + title.ariaSort);
  }
  const found = document.createElement("pre");
  found.id = "sorted-" + number;
  found.textContent = told.join("~");
  document.body.append(found);
});
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no browser")
def test_titles_are_buttons_that_sort(tmp_path: Path) -> None:
    nan = row("atc", 0.5, float("nan"), 130.0)
    few = dataclasses.replace(row("atc", 0.3, 80.0, 150.0), counts=(196, 58, 58, 17))
    table = dataclasses.replace(evaluation(), rows=(*evaluation().rows, nan, few))
    file = tmp_path / "page.html"
    file.write_text(report.html(table).replace("</body>", CLICKS))
    dom = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
    ).stdout
    head, cells = evaluations.columns(table)
    for number, title in enumerate(head):
        (told,) = re.findall(f'<pre id="sorted-{number}">(.*?)</pre>', dom, re.S)
        orders = [each.split("#") for each in unescape(told).split("~")]
        words = title in ("setting", "tokens", "code")
        ways = ["ascending", "descending"] if words else ["descending", "ascending"]
        assert [way for _, way in orders] == ways
        for order, way in orders:
            shown = order.split("|")
            assert sorted(shown) == sorted(row[number] for row in cells)
            there = [cell for cell in shown if cell not in ("", "nan")]
            assert shown[: len(there)] == there, "what is missing comes last"
            if not words:
                values = [float(cell.rstrip("x%")) for cell in there]
                assert values == sorted(values, reverse=way == "descending")
            elif title == "tokens":
                last = "196 → 98 → 49" if way == "ascending" else "196 → 58 → 17"
                assert there[-1] == last
