"""A page of HTML that needs no other file: sections of tables, pictures and text."""

import base64
import html
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hsee_jax.report.figures import Picture
from hsee_jax.report.tables import Table

_FEW = 20  # pictures; a table of contents does not list more than these


class Section(NamedTuple):
    """A heading and what stands below it; a string is a paragraph."""

    heading: str
    parts: Sequence[Table | Picture | str]


def page(title: str, sections: Sequence[Section]) -> str:
    """Return a page with a table of contents, for any width, light or dark."""
    body = "\n".join(
        [f"<h1>{html.escape(title)}</h1>", _contents(sections), *_body(sections)]
    )
    return _PAGE.replace("TITLE", html.escape(title)).replace("BODY", body)


def _contents(sections: Sequence[Section]) -> str:
    """Link to all sections, and to their pictures if there are few."""
    few = sum(len(_pictures(section)) for section in sections) <= _FEW
    entries = []
    for number, section in enumerate(sections, start=1):
        links = "".join(
            f'<li><a href="#{_anchor(picture)}">{html.escape(picture.heading)}</a></li>'
            for picture in (_pictures(section) if few else ())
        )
        below = f"<ul>{links}</ul>" if links else ""
        heading = html.escape(section.heading)
        entries.append(f'<li><a href="#s{number}">{heading}</a>{below}</li>')
    return f'<nav aria-label="Contents"><ul>{"".join(entries)}</ul></nav>'


def _pictures(section: Section) -> list[Picture]:
    return [part for part in section.parts if isinstance(part, Picture)]


def _body(sections: Sequence[Section]) -> Iterator[str]:
    for number, section in enumerate(sections, start=1):
        yield f'<h2 id="s{number}">{html.escape(section.heading)}</h2>'
        for part in section.parts:
            if isinstance(part, Table):
                yield _table(part)
            elif isinstance(part, Picture):
                yield _picture(part)
            else:
                yield f"<p>{html.escape(part)}</p>"


def _anchor(picture: Picture) -> str:
    return picture.name.removesuffix(".png")


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    return (
        f'<h3 id="{_anchor(picture)}">{html.escape(picture.heading)}</h3>\n'
        f'<figure><div class="wide"><img alt="{html.escape(picture.title)}" '
        f'src="data:image/png;base64,{data}"></div>\n'
        f"<figcaption>{html.escape(picture.text)}</figcaption></figure>"
    )


def _table(table: Table) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)

    rows = "\n".join(f"<tr>{line(row, 'td')}</tr>" for row in table.rows)
    return (
        f'<h3>{html.escape(table.title)}</h3>\n<div class="wide"><table>\n'
        f"<tr>{line(table.header, 'th')}</tr>\n{rows}\n</table></div>"
    )


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>TITLE</title>
<style>
:root { color-scheme: light dark; --text: #222; --page: #fff; --line: #d0d0d0;
  --soft: #f4f5f7; --quiet: #555; --link: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e4e4; --page: #16181c; --line: #3c4048; --soft: #1f2329;
    --quiet: #b0b4bb; --link: #7db7f0; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto;
  padding: 0 1rem; color: var(--text); background: var(--page);
  overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; }
h2 { font-size: 1.3rem; margin-top: 3rem; padding-bottom: 0.3rem;
  border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2rem 0 0.6rem; }
a { color: var(--link); }
nav { background: var(--soft); border-radius: 8px; padding: 0.8rem 1rem; }
nav ul { margin: 0; padding-left: 1.2rem; columns: 18rem; column-gap: 2rem; }
nav ul ul { columns: auto; font-size: 0.92rem; }
nav > ul > li { break-inside: avoid; }
figure { margin: 0; }
figcaption { color: var(--quiet); max-width: 44rem; margin-top: 0.5rem; }
.wide { overflow-x: auto; }
img { display: block; width: 100%; min-width: 34rem; height: auto; background: #fff;
  border-radius: 8px; }
table { border-collapse: collapse; overflow-wrap: normal; }
th, td { padding: 0.3rem 0.6rem; text-align: left;
  border-bottom: 1px solid var(--line); }
th { border-bottom: 2px solid var(--quiet); white-space: nowrap; }
td { font-variant-numeric: tabular-nums; }
@media (max-width: 40rem) { td, th { padding: 0.3rem 0.5rem; font-size: 0.9rem; } }
</style>
</head>
<body>
BODY
</body>
</html>
"""
