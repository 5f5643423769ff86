"""Show the comments beside the fields of a type, and above a constant, in the API.

The fields of a NamedTuple or a dataclass are documented by comments: on the same line,
or on the lines above. This extension of griffe adds them to the docstring of the class
as its attributes.
"""

import ast
from typing import Any

import griffe


class Fields(griffe.Extension):
    """Turns comments into documentation."""

    def on_package(self, *, pkg: griffe.Module, **context: Any) -> None:
        """Add the comments of a package."""
        _document(pkg)


def _document(module: griffe.Module) -> None:
    for member in module.members.values():
        if member.is_alias:
            continue
        if isinstance(member, griffe.Module):
            _document(member)
        elif isinstance(member, griffe.Class):
            _document_fields(member)
        elif isinstance(member, griffe.Attribute) and member.docstring is None:
            member.docstring = _docstring(member, _comment(member))


def _document_fields(kind: griffe.Class) -> None:
    fields = [
        member
        for member in kind.members.values()
        if isinstance(member, griffe.Attribute)
        and member.annotation is not None
        and not member.name.startswith("_")
        and "property" not in member.labels
        and "ClassVar" not in str(member.annotation)
    ]
    text = kind.docstring.value if kind.docstring else ""
    if not fields or "Attributes:" in text or _is_protocol(kind):
        return
    lines = [f"  {field.name}: {_comment(field) or _help(field)}" for field in fields]
    kind.docstring = _docstring(kind, "\n".join([text, "", "Attributes:", *lines]))


def _is_protocol(kind: griffe.Class) -> bool:
    return any("Protocol" in str(base) for base in kind.bases)


def _docstring(owner: Any, text: str) -> griffe.Docstring | None:
    if not text:
        return None
    return griffe.Docstring(text, lineno=owner.lineno, parent=owner, parser="google")


def _comment(field: griffe.Attribute) -> str:
    """Return the comment on a field's last line, or on the lines above the field."""
    source = field.lines_collection[field.filepath]
    first, last = field.lineno or 1, field.endlineno or field.lineno or 1
    beside = source[last - 1].split("  # ")[1:]
    words = [part for part in beside if not part.startswith("type:")]  # for a checker
    if not words:
        for line in reversed(source[: first - 1]):
            if not line.strip().startswith("# "):
                break
            words.insert(0, line.strip().removeprefix("# "))
    return " ".join(words)


def _help(field: griffe.Attribute) -> str:
    """Return the help text in a field's ``Annotated``, or a dash."""
    try:
        tree = ast.parse(str(field.annotation), mode="eval")
    except SyntaxError:
        return "–"
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and " " in node.value
    ]
    return texts[0] if texts else "–"
