"""The repository agrees with itself: one URL, exact pins, an index of equations, a page for each module."""
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import check_pages
import equations

CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
URL = CONFIG["repository"]["url"]
SLUG = URL.removeprefix("https://github.com/")
TEXT = {".md", ".py", ".yml", ".toml", ".cff", ".txt", ".ipynb", ".cfg", ".css", ""}
OUTSIDE = {".git", ".venv", ".venv-book", ".pytest_cache", ".ruff_cache", "_build", "__pycache__", "vendor", "runs",
           "data"}


def tracked():
    """The text files of the project."""
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        if path.suffix in TEXT and not OUTSIDE & set(parts) and "egg-info" not in str(path) and path.is_file():
            yield path


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_one_url():
    """Every mention of this repository is the one of _config.yml."""
    name = "(?:minigen|" + re.escape(SLUG.split("/")[1]) + ")"
    mention = re.compile(rf"(?:github|githubusercontent)\.com/([\w.-]+/{name})(?![\w-])"
                         r"|colab\S*?/github/([\w.-]+/[\w.-]+)/")
    found = {}
    for path in tracked():
        if path.resolve() != Path(__file__).resolve():
            for m in mention.finditer(path.read_text(encoding="utf-8")):
                found.setdefault((m[1] or m[2]).removesuffix(".git"), path)
    assert set(found) <= {SLUG}, found


@pytest.mark.parametrize("name", ["README.md", "CITATION.cff", "pyproject.toml", "CONTRIBUTING.md"])
def test_url_is_there(name):
    assert URL in read(name)


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-book.txt"])
def test_pins_are_exact(name):
    lines = [x.split("#")[0].strip() for x in read(name).splitlines()]
    for line in filter(None, lines):
        assert re.fullmatch(r"-r requirements-book\.txt|-e \.|[\w.-]+==[\w.]+", line), line


def test_package_has_lower_bounds_only():
    project = tomllib.loads(read("pyproject.toml"))["project"]
    for line in [*project["dependencies"], *project["optional-dependencies"]["train"]]:
        assert re.fullmatch(r"[\w-]+>=[\d.]+", line), f"{line}: an upper bound would replace Colab's own"
    assert "torch>=2.6" in project["dependencies"]


def test_version_is_the_same_everywhere():
    version = tomllib.loads(read("pyproject.toml"))["project"]["version"]
    assert importlib.import_module("minigen").__version__ == version
    assert f"\nversion: {version}\n" in read("CITATION.cff")
    assert f"## [{version}]" in read("CHANGELOG.md")


def test_equation_index_is_up_to_date():
    assert equations.page() == equations.PAGE.read_text(encoding="utf-8"), "run: make text"


def test_every_equation_has_a_test():
    known, marked = set(equations.equations()), {m.label for m in equations.marks()}
    assert known - marked == set(), "no test is marked with these equations"
    assert marked - known == set(), "these marks name no equation of a chapter"


@pytest.mark.parametrize("mark", equations.marks(), ids=lambda m: f"{m.label}-{m.test}")
def test_marked_function_exists(mark):
    if mark.function is None:
        return
    parts = mark.function.split(".")
    found = importlib.import_module(".".join(parts[:2]))
    for part in parts[2:]:
        found = getattr(found, part)


def test_api_page_names_every_module():
    modules = {f"minigen.{p.stem}" for p in (ROOT / "minigen").glob("*.py") if not p.stem.startswith("_")}
    named = set(re.findall(r"automodule:: (minigen\.\w+)", read("book/api.md")))
    assert named == modules


def test_api_page_needs_no_torch():
    """Autodoc can import every module where PyTorch is not installed (it is replaced by mocks)."""
    script = """
import importlib, pathlib, sys
sys.path.insert(0, "book/_ext")
import light_autodoc
from sphinx.ext.autodoc.mock import mock
with mock(light_autodoc.HEAVY):
    for path in sorted(pathlib.Path("minigen").glob("[a-z]*.py")):
        importlib.import_module("minigen." + path.stem)
"""
    pytest.importorskip("sphinx")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_reference_leads_somewhere():
    entries = re.split(r"(?m)^@", read("book/references.bib"))[1:]
    for entry in entries:
        assert re.search(r"(?m)^\s*(eprint|doi|url)\s*=", entry), entry.splitlines()[0]


def test_toc_lists_every_page():
    files = re.findall(r"(?:root|file): (\S+)", read("_toc.yml"))
    pages = [p.relative_to(ROOT) for folder in ("book", "chapters") for p in (ROOT / folder).glob("*.md")]
    assert set(files) == {p.with_suffix("").as_posix() for p in pages}


def test_raw_text_is_seen_on_pages():
    """The patterns of the page check find what they look for, and nothing in prose."""
    raw = check_pages.RAW
    assert re.search(raw["a raw formula"], "so $x_t$ is") and re.search(raw["a raw formula"], r"\(x\)")
    assert not re.search(raw["a raw formula"], "it costs $5 an hour, or $ 6 a day")
    assert not re.search(raw["a raw formula"], "from $5 to $6")
    assert re.search(raw["a raw role"], "see {eq}`a`") and re.search(raw["a raw directive"], "x\n:::{note}")


@pytest.mark.parametrize("name", ["LICENSE", "LICENSE-text", "README.md", "CONTRIBUTING.md", "CHANGELOG.md",
                                  "CITATION.cff", "Makefile", ".ci/run", "_toc.yml"])
def test_is_there(name):
    assert (ROOT / name).stat().st_size > 100
