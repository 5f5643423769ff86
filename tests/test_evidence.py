"""What the pages claim was tried is tried: each row of their tables names a test."""

import ast
import re
from pathlib import Path

import pytest
from page_tables import DOCS, read_table

TESTS = Path(__file__).parent
TABLES = (
    ("explanation/survival.md", "Kills"),
    ("explanation/security.md", "Who called"),
)
NAMED = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


def has_test(file, name):
    path = TESTS / file
    tree = ast.parse(path.read_text()) if path.exists() else ast.Module([], [])
    return name in {node.name for node in tree.body if hasattr(node, "name")}


@pytest.mark.parametrize(("page", "heading"), TABLES)
def test_each_row_names_a_test(page, heading):
    for row in read_table(page, heading):
        assert NAMED.search(row["test"]), row


def test_the_tests_that_pages_name_are_there():
    pages = {path: path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md")}
    found = [pair for text in pages.values() for pair in NAMED.findall(text)]
    assert len(found) > 10
    assert [pair for pair in found if not has_test(*pair)] == []
