"""Pieces of HTML for reports and notebooks. They are complete: a browser fetches nothing for them.

Text is always given as plain text, and is escaped here. Pieces take the text colour of the page and
leave its background as it is, so they can be read on a light page and on a dark one.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Collection, Sequence

STYLE = """<style>
.tokred{--hair:rgba(127,127,127,.35);--tint:rgba(127,127,127,.14);font-size:14px;line-height:1.45}
.tokred p{margin:.5em 0}
.tokred .small,.tokred caption{font-size:.87em;opacity:.85}
.tokred .scroll{overflow-x:auto;max-width:100%}
.tokred table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:.4em 0}
.tokred caption{text-align:left;padding:.2em 0}
.tokred caption span{display:inline-block;position:sticky;left:0;max-width:calc(100vw - 40px)}
.tokred th,.tokred td{padding:.28em .5em;text-align:right;white-space:nowrap;
border-bottom:1px solid var(--hair)}
.tokred thead th{font-weight:600;vertical-align:bottom;white-space:normal;min-width:3.6em}
.tokred th:first-child{text-align:left;min-width:0}
.tokred tbody th{font-weight:400}
.tokred .name{display:inline-block;width:max-content;max-width:min(22em,40vw);white-space:normal;
font-weight:inherit;overflow-wrap:anywhere}
.tokred tr.marked th,.tokred tr.marked td{font-weight:600;background:var(--tint)}
.tokred svg{display:block;width:100%;max-width:680px;height:auto;overflow:visible}
.tokred svg text{fill:currentColor;font-size:12px}
.tokred svg .axis{stroke:currentColor;stroke-opacity:.2}
.tokred .legend{display:flex;flex-wrap:wrap;gap:.2em 1.1em;padding:0;margin:.4em 0;list-style:none;
font-size:.87em}
.tokred .legend li{display:flex;gap:.35em;margin:0;overflow-wrap:anywhere}
.tokred .legend svg{flex:none;width:14px;height:14px;margin-top:.2em}
.tokred summary{cursor:pointer}
@media (max-width:600px){.tokred svg text{font-size:19px}}
</style>"""


def escape(text: str) -> str:
    """Plain text as HTML, in attributes too."""
    return html.escape(text, quote=True)


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph, with the CSS class `kind` if one is given."""
    return f'<p class="{escape(kind)}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def listed(items: Sequence[str], shown: int | None = None) -> str:
    """A list of items. All but the first `shown` are folded away. Empty if there are no items."""
    if shown is not None and len(items) > shown + 1:
        folded = f"<summary>{len(items) - shown} more</summary>{listed(items[shown:])}"
        return f"{listed(items[:shown])}<details>{folded}</details>"
    points = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f"<ul>{points}</ul>" if points else ""


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str = "",
    marked: Collection[int] = (),
) -> str:
    """A table. If it is too wide, it scrolls in its own box, also by keys.

    Args:
        head: the titles of the columns.
        rows: their cells; the first cell names the row.
        caption: the caption of the table.
        marked: the numbers of the rows that stand out.

    Raises:
        ValueError: a row has not the same number of cells as the head.
    """
    lines = []
    for number, (first, *cells) in enumerate(rows):
        if len(cells) + 1 != len(head):
            raise ValueError(
                f"row {number} must have {len(head)} cells, as the head, not {len(cells) + 1}"
            )
        kind = ' class="marked"' if number in marked else ""
        told = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        # An element of its own, because screen readers do not tell of CSS.
        tag = "strong" if number in marked else "span"
        name = f'<{tag} class="name">{escape(first)}</{tag}>'
        lines.append(f'<tr{kind}><th scope="row">{name}</th>{told}</tr>')
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    above = f"<caption><span>{escape(caption)}</span></caption>" if caption else ""
    return _scrolling(
        f"<table>{above}<thead><tr>{titles}</tr></thead><tbody>{''.join(lines)}</tbody></table>",
        "table",
    )


def picture(png: bytes, alt: str) -> str:
    """A picture inside of the page."""
    data = base64.b64encode(png).decode()
    return _scrolling(f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}">', "picture")


def _scrolling(content: str, name: str) -> str:
    """A box that scrolls by itself. Keys reach it, so it needs a role and a name."""
    return f'<div class="scroll" tabindex="0" role="group" aria-label="{name}">{content}</div>'
