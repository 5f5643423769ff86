"""Show the comments beside the fields of a type, and above a constant, in the API.

Signatures lose the help and the rules of options, which the reference shows.

The fields of a NamedTuple or a dataclass are documented by comments: on the same line,
or on the lines above. This extension of griffe adds them to the docstring of the class
as its attributes.
"""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import griffe


class Fields(griffe.Extension):
    """Turns comments into documentation."""

    def on_package(self, *, pkg: griffe.Module, **context: Any) -> None:
        """Add the comments of a package."""
        _document(pkg, dict(_summaries(pkg)))


Summaries = Mapping[str, str]  # name of a type -> the first line of its docstring


def _summaries(module: griffe.Module) -> Iterator[tuple[str, str]]:
    for member in module.members.values():
        if isinstance(member, griffe.Module) and not member.is_alias:
            yield from _summaries(member)
        elif isinstance(member, griffe.Class) and member.docstring is not None:
            yield member.name, member.docstring.value.partition("\n")[0].rstrip(".")


def _document(module: griffe.Module, summaries: Summaries) -> None:
    for member in module.members.values():
        if member.is_alias:
            continue
        if isinstance(member, griffe.Module):
            _document(member, summaries)
        elif isinstance(member, griffe.Class):
            _document_fields(member, summaries)
        elif isinstance(member, griffe.Function):
            _shorten(member)
        elif isinstance(member, griffe.Attribute) and member.docstring is None:
            member.docstring = _docstring(member, _comment(member))


def _shorten(function: griffe.Function) -> None:
    """Show the types of a function's options without their help and rules."""
    for parameter in function.parameters:
        annotation = parameter.annotation
        if str(annotation).startswith("Annotated["):
            assert isinstance(annotation, griffe.ExprSubscript)
            assert isinstance(annotation.slice, griffe.ExprTuple)
            parameter.annotation = annotation.slice.elements[0]


def _document_fields(kind: griffe.Class, summaries: Summaries) -> None:
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
    texts = [_comment(field) or _help(field, summaries) for field in fields]
    lines = [f"  {f.name}: {text}" for f, text in zip(fields, texts, strict=True)]
    kind.docstring = _docstring(kind, "\n".join([text, "", "Attributes:", *lines]))


def _is_protocol(kind: griffe.Class) -> bool:
    return any("Protocol" in str(base) for base in kind.bases)


def _docstring(owner: Any, text: str) -> griffe.Docstring | None:
    if not text:
        return None
    return griffe.Docstring(text, lineno=owner.lineno, parent=owner, parser="google")


def _comment(field: griffe.Attribute) -> str:
    """Return the comment on a field's last line, or on the lines above the field."""
    assert isinstance(field.filepath, Path)
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


def _help(field: griffe.Attribute, summaries: Summaries) -> str:
    """Return the help in a field's ``Annotated``, or what its type is, or its name."""
    tree = ast.parse(str(field.annotation), mode="eval")
    constants = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
    for value in constants:
        if isinstance(value, str) and " " in value:
            return value
    names = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name)]
    known = [summaries[name] for name in names if name in summaries]
    return known[0] if known else field.name.replace("_", " ")
