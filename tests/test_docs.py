"""The documentation's pages name tests and files that exist."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
TESTS = {
    name
    for path in (ROOT / "tests").rglob("*.py")
    for name in re.findall(r"def (test_\w+)", path.read_text())
}


def names(text):
    return set(re.findall(r"`(test_\w+)`", text))


def targets(text):
    return re.findall(r"\]\(([^)#:]+)\)", text)


def test_the_guarantees_name_tests_and_files():
    text = (ROOT / "docs" / "guarantees.md").read_text()
    assert names(text)
    assert targets(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_what_exists(page):
    text = page.read_text()
    assert names(text) <= TESTS
    for target in targets(text):
        assert (page.parent / target).exists(), target
