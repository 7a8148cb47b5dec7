"""The documentation's pages name tests and files that exist, and leave no message or metric out."""

import ast
import itertools
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


def paths(text):
    folders = "tests|examples|experiments|benchmarks|proma_jax|docs"
    return set(re.findall(rf"`((?:{folders})/[\w/]+\.py)`", text))


def targets(text):
    return re.findall(r"\]\(([^)#:]+)\)", text)


def test_the_guarantees_name_tests_and_files():
    text = (ROOT / "docs" / "guarantees.md").read_text()
    assert names(text)
    assert paths(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_what_exists(page):
    text = page.read_text()
    assert names(text) <= TESTS
    for target in targets(text):
        assert (page.parent / target).exists(), target
    for path in paths(text):
        assert (ROOT / path).exists(), path


def literals(message):
    """The parts of a message that are the same whatever it is about."""
    match message:
        case ast.JoinedStr(values=parts):
            return [part.value for part in parts if isinstance(part, ast.Constant)]
        case ast.Constant(value=str() as text):
            return [text]
    return []


def messages():
    """The messages of errors and warnings, each as its literal parts."""
    for path in (ROOT / "proma_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Raise(exc=ast.Call(func=ast.Name(id="ValueError"), args=[message])):
                    yield literals(message)
                case ast.Call(func=ast.Attribute(attr="warn"), args=[message, *_]):
                    yield literals(message)


def test_every_error_message_has_its_cure():
    found = list(messages())
    assert len(found) > 50
    page = " ".join((ROOT / "docs" / "troubleshooting.md").read_text().split())
    for part in itertools.chain.from_iterable(found):
        if len(part) > 12:  # shorter ones are words between two names or numbers
            assert part.strip() in page, part


def test_every_metric_is_explained():
    training = ast.parse((ROOT / "experiments" / "training.py").read_text())
    [train] = [node for node in training.body if getattr(node, "name", None) == "train"]
    metrics = set(re.findall(r"`([a-z_A-Z]+)`", ast.get_docstring(train).split("Row 0")[1]))
    metrics -= {"kl_sequences", "stopping"}
    assert "step_kl" in metrics
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert {name for name in metrics if f"`{name}`" not in page} == set()
