"""One page that holds everything: text, tables and pictures in a single HTML file that can be mailed and printed.

Knows sections; must not know what they are about. Nothing is fetched when it is opened, and text is shown as it is.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from megalith.base.errors import ConfigError, MachineError
from megalith.base.whole_file import write_whole
from megalith.report.table import Table

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.lead { font-size: 1.1rem; } .wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .5rem 0; font-size: .9rem; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { border-bottom: 1px solid #8886; padding: .25rem .6rem; vertical-align: top; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
img { max-width: 100%; background: white; } code { white-space: pre-wrap; }
footer { margin-top: 3rem; color: #888; font-size: .85rem; }
@media print { body { margin: 0; font-size: 11px; } h2 { break-after: avoid; } img, table { break-inside: avoid; } }
"""


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what stands below it, in this order."""

    title: str
    lines: Sequence[str] = ()
    """A list."""
    code: str = ""
    pictures: Sequence[tuple[str, bytes]] = ()
    """(what is seen, PNG)."""
    tables: Sequence[Table] = field(default=())


def render(title: str, lead: Sequence[str], sections: Sequence[Section], footer: str) -> str:
    """The page."""
    parts = [f"<h1>{escape(title)}</h1>", *(f'<p class="lead">{escape(line)}</p>' for line in lead)]
    for section in sections:
        parts.append(f"<h2>{escape(section.title)}</h2>")
        if section.lines:
            parts.append("<ul>" + "".join(f"<li>{escape(line)}</li>" for line in section.lines) + "</ul>")
        if section.code:
            parts.append(f"<pre><code>{escape(section.code)}</code></pre>")
        for seen, png in section.pictures:
            parts.append(f'<img alt="{escape(seen)}" src="data:image/png;base64,{b64encode(png).decode()}">')
        parts += [table.to_html() for table in section.tables]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + f"\n<footer>{escape(footer)}</footer>\n</body></html>\n"
    )


def check_page_path(path: Path) -> None:
    """Raise ConfigError before the work, not after it."""
    if path.suffix != ".html":
        raise ConfigError(f"{path.name!r} is no name of a page.", "End it in .html.")
    if not path.parent.is_dir():
        raise ConfigError(f"There is no folder {path.parent}.", "Make it, or name another file.")


def write_page(path: Path, text: str) -> None:
    """Write the page, whole or not at all. Raises MachineError."""
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise MachineError(f"{path} could not be written: {error.strerror}.", "Make room, or name another.") from None
