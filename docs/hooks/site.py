"""Build the site: add the generated pages, and link the flags that pages name."""

import re
from pathlib import Path
from posixpath import dirname, relpath
from typing import Any

import pages
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^ *(```|~~~)")
_FLAG = re.compile(r"(?<![\[`\w])`(--[a-z][a-z-]+)( [^`\n]+)?`(?![`{\]])")


def on_config(config: Any) -> Any:
    """List the API page of every package in the navigation."""
    (reference,) = [
        section["Reference"] for section in config.nav if "Reference" in section
    ]
    (entry,) = [entry for entry in reference if "API" in entry]
    packages = [{name: path} for name, path in pages.api_paths().items()]
    entry["API"] = [entry["API"], *packages]
    return config


@event_priority(100)  # before the plugin that renders notebooks
def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages, and the pages from outside of docs/."""
    for path, text in pages.generated().items():
        files.append(File.generated(config, path, content=text))
    for path, source in pages.SOURCES.items():
        if (
            path == source
        ):  # a plain file: the plugin for notebooks reads it by its path
            urls = config.use_directory_urls
            files.append(File(path, str(ROOT), config.site_dir, urls))
        else:
            copy = File.generated(config, path, abs_src_path=str(ROOT / source))
            files.append(copy)
    return files


def on_page_markdown(markdown: str, *, page: Any, **context: Any) -> str:
    """Link each flag in the text of a page to its entry in the reference."""
    path = page.file.src_uri
    if path in pages.generated() or path in pages.SOURCES:
        return markdown
    lines, in_code = [], False
    for line in markdown.splitlines():
        in_code ^= bool(_FENCE.match(line))
        plain = not in_code and not line.startswith("#")
        lines.append(_FLAG.sub(lambda m: _link(m, path), line) if plain else line)
    return "\n".join(lines)


def _link(found: re.Match[str], path: str) -> str:
    target = pages.anchors().get(found[1])
    if target is None:
        return found[0]
    return f"[{found[0]}]({relpath(target, dirname(path) or '.')})"
