"""Values and help texts as Markdown, for the cells of tables."""

import html
import re
from collections.abc import Iterable, Sequence

from hsee_jax.core.options import text_of


def flag(name: str) -> str:
    """Return the flag of an option, without its dashes."""
    return name.replace("_", "-")


def shown(value: object) -> str:
    """Return an option's value as code; "none" where there is none."""
    if value is None or value == ():
        return "none"
    return code(str(value).lower() if isinstance(value, bool) else text_of(value))


def code(words: object) -> str:
    """Return inline code."""
    return f"`{words}`"


def prose(words: str) -> str:
    """Return help text as Markdown, with the mark of our choices as a badge."""
    plain = html.escape(words, quote=False).replace("%%", "%")
    plain = re.sub(r"([|*])", r"\\\1", plain)
    plain = re.sub(r"\[ours: ([^]]*)\]", r'<span class="ours">ours</span> (\1)', plain)
    plain = plain.replace("[ours]", '<span class="ours">ours</span>')
    plain = re.sub(r"(?<!\S)(--[a-z][a-z-]+)", r"`\1`", plain)
    first = plain.split(" ")[0].replace("-", "")
    is_word = first.isalpha()  # and not a name, such as train.npz
    return plain[:1].upper() + plain[1:] if is_word else plain


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
