"""What the pages say exists: test ids, links, commands and their options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

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
            assert line.split(" | ")[1].startswith(("done: ", "not reached: ", "open")), line


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_and_pictures_exist(page):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("project", sorted(ROOT.glob("projects/*")), ids=lambda path: path.name)
def test_model_table_equals_the_metafile(project):
    """Every published config stands in both, with the same numbers."""
    models = yaml.safe_load((project / "metafile.yml").read_text())["Models"]
    expected = [
        [
            f"[{m['config']}](configs/{m['config']}.yaml)",
            *("-" if value is None else str(value) for key, value in m.items() if key != "config"),
        ]
        for m in models
    ]
    lines = (project / "README.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if "](configs/" in line]
    assert rows == expected
    files = {path.stem for path in (project / "configs").glob("*.yaml")}
    published = {f for f in files if not f.startswith(("Base", "nuclei"))}
    assert published == {model["config"] for model in models}


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
        config = getattr(args, "config_file", "")
        if config and not config.startswith("output/"):  # what an earlier command wrote
            assert find_config(config).is_file()


def test_there_are_commands_to_check():
    assert sum(len(list(commands(page))) for page in PAGES) >= 8
