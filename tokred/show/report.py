"""One page of HTML that tells what an evaluation has found: in words, as a plot, as a table.

    table = tokred.evaluate(model, "flowers/val")
    tokred.report.write("report.html", table, profile=tokred.profile(model, images, "atc", 0.5))

The page is one file, and a browser fetches nothing for it. It can be read on a phone, in dark mode,
on paper and without scripts. With scripts, the titles of the table are buttons that sort it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tokred.data.writing import write_text
from tokred.measure.evaluation import Evaluation
from tokred.measure.profile.values import Profile
from tokred.show.evaluations import change, conditions, number, plot, settings_table
from tokred.show.markup import STYLE, escape, listed, paragraph, picture
from tokred.show.profiles import fragment

if TYPE_CHECKING:
    from PIL.Image import Image


DROPS = (0.5, 2.0)
"""The headline names the fastest setting that loses at most these points of the leading metric."""
SHARES = (0.01, 0.05)
"""The same, for metrics that are no percentages, as shares of the dense model's score."""
_STRIP = "an image, then its tokens after each reduction"


class Advising(Protocol):
    """What the page takes of an advice."""

    @property
    def code(self) -> str: ...

    @property
    def sentences(self) -> tuple[str, ...]: ...


def write(
    path: str | Path,
    evaluation: Evaluation | None,
    *,
    profile: Profile | None = None,
    pictures: Sequence[tuple[str, Image]] = (),
    advice: Advising | None = None,
    title: str | None = None,
) -> None:
    """Writes the page; see `html`."""
    page = html(evaluation, profile=profile, pictures=pictures, advice=advice, title=title)
    write_text(Path(path), page)


def html(
    evaluation: Evaluation | None,
    *,
    profile: Profile | None = None,
    pictures: Sequence[tuple[str, Image]] = (),
    advice: Advising | None = None,
    title: str | None = None,
) -> str:
    """The page.

    Args:
        evaluation: the table; None for a page about a profile alone.
        profile: where the time of one setting goes.
        pictures: strips that `tokred.visualise` has drawn, each with its caption.
        advice: its sentences and its line of code come first.
        title: the heading; the model's name, if not given.

    Raises:
        ValueError: there is neither an evaluation nor a profile.
    """
    about = evaluation or profile
    if about is None:
        raise ValueError("evaluation must be given, or profile: there is nothing to report")
    heading = title or f"{about.model} with fewer tokens"
    body = [f"<h1>{escape(heading)}</h1>"]
    if evaluation is not None or advice is not None:
        body.append(_headline(evaluation, advice))
    if evaluation is not None:
        body += [
            _section("What it gains, and what it costs", plot(evaluation)),
            _section("All settings", f'<div class="sortable">{settings_table(evaluation)}</div>'),
        ]
        if evaluation.refused:
            told = [f"{name}: {reason}" for name, reason in evaluation.refused.items()]
            body.append(_section("What was refused", listed(told)))
    if profile is not None:
        body.append(_section("Where the time goes", fragment(profile, style=False)))
    if pictures:
        shown = "".join(
            f"<figure>{picture(_png(image), f'{caption}: {_STRIP}')}"
            f"<figcaption>{escape(caption)}</figcaption></figure>"
            for caption, image in pictures
        )
        body.append(_section("Which tokens became one", shown))
    if evaluation is not None:
        body.append(_section("Conditions", listed(conditions(evaluation))))
    body.append(_section("How to read it", _reading(evaluation, profile)))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(heading)}</title>{STYLE}{_STYLE}</head>\n"
        f'<body class="tokred"><main>\n{"".join(part + chr(10) for part in body)}</main>\n'
        f"{_SCRIPT}</body></html>\n"
    )


def _headline(evaluation: Evaluation | None, advice: Advising | None) -> str:
    parts = []
    if advice is not None:
        parts += [paragraph(sentence) for sentence in advice.sentences]
    if evaluation is not None:
        images = evaluation.dense.images
        measured = "" if str(images) in evaluation.data else f", measured on {images} images"
        score = f"{evaluation.leading} {number(evaluation.score(evaluation.dense))}"
        parts.append(
            paragraph(
                f"On {evaluation.data}, the dense model has "
                f"{score}{evaluation.unit} at {evaluation.images_per_second(evaluation.dense):.1f} "
                f"images/s{measured}."
                if evaluation.dense.metrics
                else f"{evaluation.data}: there are no labels, so that what counts is how close a "
                f"setting stays to the dense model, measured on {evaluation.dense.compared} images."
            )
        )
    code = ""
    if advice is not None:
        code = advice.code  # empty if nothing helps
    elif evaluation is not None:
        told, code = _found(evaluation)
        parts.append(listed(told))
    if code:
        parts.append("<p>To use it:</p>")
        parts.append(f"<pre><code>{escape(code)}</code></pre>")
    if evaluation is not None:
        parts += [paragraph(sentence) for sentence in evaluation.warnings()]
    return f'<section class="headline">{"".join(parts)}</section>'


def _found(evaluation: Evaluation) -> tuple[list[str], str]:
    """For each drop a sentence about the fastest setting within it, and the code of the first."""
    told, code = [], ""
    percent = evaluation.unit == "%"
    for drop, share in zip(DROPS, SHARES, strict=True):
        if percent:
            most, words = drop, f"At most {drop:g} points lost"
        else:
            most = share * abs(evaluation.score(evaluation.dense))
            words = f"At most {share:.0%} worse"
        try:
            best = evaluation.best(max_drop=most)
        except LookupError:
            told.append(f"{words}: none of the settings that were tried is as fast as that.")
            continue
        if best.code == code:
            told.append(f"{words}: the same.")
            continue
        told.append(
            f"{words}: {best.name}, {best.speed_up:.2f}x as fast ({evaluation.leading} "
            f"{change(evaluation, best)}; cutting tokens off at no cost would be "
            f"{best.free_limit:.2f}x)."
        )
        code = code or best.code
    return told, code


def _reading(evaluation: Evaluation | None, profile: Profile | None) -> str:
    told = [
        (
            "free limit",
            "The same model with its tokens cut off to the same numbers, which needs no decision "
            "and no merging: no method can be faster on this machine.",
        )
    ]
    if evaluation is not None:
        told += [
            (
                "speed-up",
                "Measured in turns with the dense model, in the same run. Where a batch of one "
                "image gains less than a large one, starting the work costs more than doing it.",
            ),
            (
                "agreement, KL, cosine",
                "How close the answers stay to the dense model's, with or without labels: the "
                "share of equal decisions, the mean Kullback-Leibler divergence of the "
                "probabilities in nats, the mean cosine between the features.",
            ),
            (
                "multiply-adds",
                "Per image, of matrix products, convolutions and attention, those of the method "
                "included.",
            ),
        ]
    if profile is not None:
        told.append(
            (
                "matching, merging, way back, bias",
                "Deciding which tokens become one; making few of them; making the full grid again; "
                "telling attention how many tokens each one stands for.",
            )
        )
    entries = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in told)
    return f"<dl>{entries}</dl>"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _png(image: Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()


_STYLE = """<style>
:root{color-scheme:light dark;--paper:#fdfdfc;--ink:#1b1d21;--soft:#f1f1ee;--accent:#2f6099}
@media (prefers-color-scheme:dark){
:root{--paper:#15171b;--ink:#e6e6e3;--soft:#212429;--accent:#8db8e8}}
body.tokred{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1240px;margin:0 auto;padding:20px 16px 48px}
h1{font-size:1.6em;line-height:1.2;margin:.2em 0 .5em;overflow-wrap:anywhere}
h2{font-size:1.15em;margin:1.8em 0 .5em}
p,li,dd{max-width:80ch;overflow-wrap:anywhere}
ul{padding-left:1.2em}
.headline{background:var(--soft);border-left:4px solid var(--accent);padding:.5em 1em .8em;
border-radius:4px}
pre{margin:.4em 0;padding:.6em .8em;background:var(--paper);border:1px solid var(--hair);
border-radius:4px;font-size:.87em;white-space:pre-wrap;overflow-wrap:anywhere}
.tokred table{font-size:14px}
.tokred thead th,.tokred tbody th{background:var(--paper)}
.tokred th:first-child{position:sticky;left:0;z-index:1}
.tokred tr.marked th,.tokred tr.marked td{background:var(--soft)}
.scroll:focus-visible,button:focus-visible{outline:2px solid var(--accent)}
.sortable button{font:inherit;color:inherit;background:none;border:0;padding:0;margin:0;width:100%;
min-height:24px;text-align:inherit;cursor:pointer}
.sortable button:hover{text-decoration:underline}
.sortable th[aria-sort=ascending] button::after{content:" \\2191"}
.sortable th[aria-sort=descending] button::after{content:" \\2193"}
figure{margin:0 0 1em}
figcaption{font-size:.87em;opacity:.85}
img{display:block;max-width:100%;min-width:560px;height:auto;border-radius:4px;background:#fff}
dt{font-weight:600;margin-top:.6em}
dd{margin:0}
@media print{
:root{color-scheme:light;--paper:#fff;--ink:#000;--soft:#eee;--accent:#555}
.tokred .scroll{overflow:visible}.tokred table{font-size:6.5pt}
.tokred th,.tokred td{padding:.15em .2em;white-space:normal}
.tokred .hint{display:none}.tokred th:first-child{position:static}
/* Buttons are not painted again where a table goes on. */
.sortable button{display:contents}thead,tr{break-inside:avoid}
img{min-width:0}figure,svg,.headline{break-inside:avoid}h2{break-after:avoid}}
</style>"""

_SCRIPT = """<script>
for (const caption of document.querySelectorAll(".sortable caption span")) {
  const hint = document.createElement("span");
  hint.className = "hint";
  hint.textContent = "The titles are buttons that sort.";
  caption.append(" ", hint);
}
document.querySelectorAll(".sortable th[scope=col]").forEach((title, column) => {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...title.childNodes);
  title.append(button);
  button.addEventListener("click", () => {
    const body = title.closest("table").tBodies[0];
    const told = row => row.cells[column].textContent;
    const number = /^[-+]?[0-9.]+(e[-+]?[0-9]+)?[x%]?$/;
    const missing = text => text === "" || /^[-+]?(nan|inf)/.test(text);
    const texts = [...body.rows].map(told).filter(text => !missing(text));
    const numbers = texts.every(text => number.test(text));
    // Numbers begin with the largest, words with the first.
    const before = title.getAttribute("aria-sort");
    const falls = before ? before === "ascending" : numbers;
    const compare = (a, b) => {
      const [x, y] = [told(a), told(b)];
      if (missing(x) || missing(y)) return missing(x) - missing(y);
      const order = numbers
        ? parseFloat(x) - parseFloat(y) : x.localeCompare(y, "en", {numeric: true});
      return falls ? -order : order;
    };
    const rows = [...body.rows].sort(compare);
    title.parentElement.querySelectorAll("th").forEach(th => th.removeAttribute("aria-sort"));
    title.setAttribute("aria-sort", falls ? "descending" : "ascending");
    body.append(...rows);
  });
});
</script>
"""
