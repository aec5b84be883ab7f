"""The documentation agrees with the code: files, commands, snippets, links."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from flash_vstream import __version__
from flash_vstream.cli.main import app
from helpers.videos import write_video

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "flash_vstream"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/**/*.md"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}(?: notest)?\n(.*?)```", page.read_text(), re.DOTALL)


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


# --- design.md and the tree


def listed_files() -> set[str]:
    """The modules listed in design.md, relative to the package."""
    (tree,) = (block for block in blocks(ROOT / "docs" / "design.md", "text") if block.startswith("src/"))
    found, package = set(), ""
    for line in tree.splitlines()[1:]:
        if opened := re.match(r"  ([\w/]+)/ ", line):
            package = f"{opened[1]}/"
        elif re.match(r"  \w", line):
            package = ""
        found |= {package + name for name in re.findall(r"\w+\.py\b", line)}
    return found


def test_design_lists_the_files_that_there_are():
    paths = {path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py")}
    packages = {path for path in paths if path.endswith("/__init__.py")}  # these have their own lines
    benchmarks = {path for path in paths if path.startswith("evaluate/benchmarks/")}  # one module each
    assert listed_files() == paths - packages - benchmarks


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_file_that_is_named_exists(page):
    bases = [ROOT, SOURCE, ROOT / "examples", ROOT / "tests", SOURCE / "evaluate" / "benchmarks"]
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    if page.name == "CHANGELOG.md":
        text = text[: text.index("## 0.1.0")]
    for name in re.findall(r"`([\w./-]+\.(?:py|yaml|yml|toml))`", text):
        assert any((base / name).exists() for base in bases) or [*SOURCE.rglob(name)], f"{page.name} names {name}"


# --- commands


def parse(words: list[str]) -> None:
    """Parse ``words`` as a command line without running it; raises for invalid ones."""
    command, context = typer.main.get_command(app), None
    name = "flash-vstream"
    while True:
        context = command.make_context(name, words, parent=context)
        if not hasattr(command, "resolve_command"):
            return
        words = [*context._protected_args, *context.args]
        if not words:
            return
        name, command, words = command.resolve_command(context, words)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_command_is_one_that_there_is(page):
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["flash-vstream"]:
                parse(words[1:])


def test_a_command_that_there_is_not_is_noticed():
    for words in (["eval", "floors", "rvs-ego"], ["ask", "clip.mp4", "what?", "--reader", "star"]):
        with pytest.raises(Exception, match=r"floors|--reader"):
            parse(words)


# --- snippets, links, versions


def test_the_python_page_runs(tiny_folder, tmp_path, monkeypatch, capsys):
    """Each snippet continues from the previous one. A tiny model stands in for nano."""
    write_video(tmp_path / "clip.mp4", frames=50)
    monkeypatch.chdir(tmp_path)
    snippets = blocks(ROOT / "docs" / "python.md", "python")
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(snippet.replace('"nano"', repr(str(tiny_folder))), names)
    printed = capsys.readouterr().out
    assert "% of the attention" in printed
    assert "100 frames in 10 slots" in printed


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_citation_has_the_version():
    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
