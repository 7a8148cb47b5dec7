"""The workflows call targets that the Makefile has, and actions that nobody can move."""

import pathlib
import re

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.any_version
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))
TARGETS = re.findall(r"^([a-z0-9-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def called(path):
    """The targets that a workflow makes, those of its matrix too."""
    return re.findall(r"(?:run: make|target:) ([a-z-]+)", path.read_text())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_makes_targets_that_exist(path):
    assert called(path)
    assert set(called(path)) <= set(TARGETS)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_by_commit_and_say_their_version(path):
    uses = re.findall(r"uses: (.*)", path.read_text())
    assert uses
    for line in uses:
        assert re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", line), line


def test_only_the_job_that_publishes_may_ask_for_an_identity():
    for path in WORKFLOWS:
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] == {"contents": "read"}
        asking = [name for name, job in workflow["jobs"].items() if "permissions" in job]
        assert asking == (["publish"] if path.stem == "publish" else [])
