"""What the pages say exists: test ids, links, commands and their options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from instseg_ext.cli import main, train
from instseg_ext.config import find_config

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("projects/*/README.md")],
    key=str,
)
TEST_ID = re.compile(r"`([\w/]+\.py)?((?:::\w+(?:\[[^`]*\])?)+)?`")


def name_of(page):
    return str(page.relative_to(ROOT))


def test_every_test_id_of_the_status_page_exists():
    checked = 0
    for line in (ROOT / "docs" / "status.md").read_text().splitlines():
        file = None
        for match in TEST_ID.finditer(line):
            file = match[1] or file
            assert file, line
            source = (ROOT / "tests" / file).read_text()
            for name in filter(None, (match[2] or "").split("::")):
                name = name.partition("*")[0].partition("[")[0]
                assert re.search(rf"(def|class) {name}\b", source), f"{file}: {name}"
            checked += 1
    assert checked > 40


def test_no_line_of_the_status_page_is_vague():
    for line in (ROOT / "docs" / "status.md").read_text().splitlines():
        if line.startswith("| ") and not line.startswith("| promise"):
            assert line.split(" | ")[1].startswith(("done: ", "open")), line


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_and_pictures_exist(page):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


def commands(page):
    """Yield the words of each command line of ours in the page's shell blocks."""
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["instseg"]:
                yield main.build_parser(), words[1:]
            elif words[:2] == ["python", "train_net.py"]:
                yield train.build_parser(), words[2:]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_of_the_pages_are_understood(page):
    for parser, words in commands(page):
        args, rest = parser.parse_known_args(words)
        assert not [word for word in rest if word.startswith("--")], words
        assert not rest or args.takes_overrides, words
        if getattr(args, "config_file", ""):
            assert find_config(args.config_file).is_file()


def test_there_are_commands_to_check():
    assert sum(len(list(commands(page))) for page in PAGES) >= 8
