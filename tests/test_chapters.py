"""The notebooks are what their sources give: executed, free of MyST, and readable by everyone."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
jupytext = pytest.importorskip("jupytext")
pytest.importorskip("myst_nb")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from plain import Plain, PlainError, raw_myst

import chapters

MDS = chapters.sources()
each_chapter = pytest.mark.parametrize("md", MDS, ids=[p.stem for p in MDS])


def notebook(md):
    return nbformat.read(md.with_suffix(".ipynb"), as_version=4)


def tags(cell):
    return set(cell.metadata.get("tags", []))


def test_every_notebook_has_a_source():
    assert [p.stem for p in MDS] == sorted(p.stem for p in (ROOT / "chapters").glob("*.ipynb"))


def test_notebooks_are_up_to_date():
    assert chapters.stale() == [], "run: make chapters (or make text, if only the text changed)"


@each_chapter
def test_executed_in_order_and_clean(md):
    code = chapters.code(notebook(md))
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    for cell in code:
        for out in cell.outputs:
            assert out.output_type != "error" or "raises-exception" in tags(cell)
            assert out.get("name") != "stderr", out.text
            shown = str(out.get("text") or out.get("data", {}).get("text/plain"))
            assert not re.search(r"/(root|home|tmp|Users)/", shown), shown


MEANT = {
    "entropy falls: False, free energy falls: True",
    "detailed balance: False",
    "the rule gives the published eps to two digits: [True, True, True, False, False]",
    "noise left in the schedule:  False",
}
"""Claims that are printed to be found false."""


@each_chapter
def test_printed_claims_hold(md):
    """Cells print what the text says with True; a False that nobody meant is an error of the cell or of the text."""
    shown = "".join(out.get("text", "") for cell in chapters.code(notebook(md)) for out in cell.outputs)
    assert [line for line in shown.splitlines() if "False" in line and line.strip() not in MEANT] == []


@each_chapter
def test_no_myst_left(md):
    for cell in notebook(md).cells:
        if cell.cell_type == "markdown":
            assert raw_myst(cell.source) == [], cell.source


@each_chapter
def test_setup_cell(md):
    first = chapters.code(chapters.source(md))[0]
    assert "remove-cell" in tags(first)
    assert f"git+{chapters.REPO}.git" in first.source and 'find_spec("minigen") is None' in first.source
    assert "--no-deps" in first.source, "Colab's torch and numpy stay as they are"


@each_chapter
def test_colab_badge(md):
    first = next(c for c in notebook(md).cells if c.cell_type == "markdown")
    link = f"https://colab.research.google.com/github/{chapters.SLUG}/blob/main/chapters/{md.stem}.ipynb"
    assert first.source.startswith("# ") and link in first.source


@each_chapter
def test_is_a_jupytext_notebook(md):
    """`jupytext --to notebook` reads the same code from the source as the book does, and no pairing is set."""
    text = md.read_text(encoding="utf-8")
    head = text.split("---")[1]
    assert "format_name: myst" in head and "file_format: mystnb" in head and "formats:" not in head
    done = subprocess.run([sys.executable, "-m", "jupytext", "--to", "notebook", "--output", "-", str(md)],
                          capture_output=True, text=True, check=True)
    theirs = [c.source.strip() for c in chapters.code(nbformat.reads(done.stdout, as_version=4))]
    assert theirs == [c.source.strip() for c in chapters.code(chapters.source(md))]


@each_chapter
def test_every_picture_speaks(md):
    """A cell that shows a picture says what to see (caption) and what is there (alt)."""
    pairs = zip(chapters.code(chapters.source(md)), chapters.code(notebook(md)))
    for cell, done in pairs:
        if tags(cell) & {"remove-cell", "remove-output"}:
            continue
        if any("image/png" in o.get("data", {}) for o in done.outputs):
            meta = cell.metadata.get("mystnb", {})
            assert len(meta.get("figure", {}).get("caption", "")) > 20, cell.source
            assert meta.get("figure", {}).get("name", "").startswith("fig"), cell.source
            assert len(meta.get("image", {}).get("alt", "")) > 20, cell.source
        for html in (o.data["text/html"] for o in done.outputs if "text/html" in o.get("data", {})):
            assert all(len(alt) > 8 for alt in re.findall(r'<img[^>]*?\balt="([^"]*)"', html))
            assert html.count("<img") == len(re.findall(r"<img[^>]*?\balt=", html))


@each_chapter
def test_live_labs_leave_no_state(md):
    """A widget needs a kernel: it leaves nothing in the stored notebook, and nbval does not compare it."""
    nb = notebook(md)
    assert "widgets" not in nb.metadata
    for cell in chapters.code(nb):
        assert not any(chapters.WIDGET in o.get("data", {}) for o in cell.outputs)
        if re.search(r"\bipywidgets\.|\blive\(", cell.source):
            assert "nbval-ignore-output" in tags(cell), cell.source


@pytest.mark.parametrize("text", [
    "{eq}`a`", ":::{note}\nx\n:::", "(a)=", "$$\nx\n$$ (a)", "% x", "x[^1]", "{{ x }}", "[a](b.md)", "a\n: b",
    "\\begin{align}\na\n\\end{align}", "![x](y.png){width=3}", "```{note}\nx\n```", ":label: x", "$$\\tag{??}$$",
    "[a](https://b.c)$x$"])
def test_raw_myst_sees(text):
    assert raw_myst(text)


@pytest.mark.parametrize("text", [
    "``{eq}`x` ``", "`(a)=`", "$x_{(a)}{b}$", "$$\n\\begin{aligned}\na\n\\end{aligned} \\tag{1}\n$$",
    "```python\n% x\nx = {{}}\n```", "[a](https://b.c)"])
def test_raw_myst_lets_pass(text):
    assert raw_myst(text) == []


@pytest.mark.parametrize("text", [
    "{foo}`a`", ":::{foo}\n:::", ":::{note}\n", "\\begin{align}\na\n\\end{align}", "{{ x }}", "a $$x$$ (e) b",
    ":::{prf:lemma}\nx\n:::"])
def test_unknown_is_refused(text):
    with pytest.raises(PlainError):
        Plain("chapters/a", {}, {}, "https://github.com/a/b", "main").cell(text)


LABELS = {name: {"doc": doc, "number": "1.2", "text": text, "title": title} for name, doc, text, title in [
    ("eq:a", "chapters/a", "(1.2)", ""), ("eq:b", "chapters/b", "(1.2)", ""),
    ("fig-a", "chapters/a", "Figure 1.2", "C"), ("thm-a", "chapters/a", "Theorem 1.2", ""),
    ("ex-a", "chapters/a", "Exercise 1.2", "Exercise"),
    ("tab-a", "chapters/a", "Table 1.2", "T")]}
BIB = {"k": {"names": "Ho et al.", "year": "2020", "url": "https://arxiv.org/abs/1"}}


@pytest.mark.parametrize("myst, plain", [
    ("see {eq}`eq:a`", "see (1.2)"),
    ("{eq}`eq:b`", "[(1.2)](https://github.com/a/b/blob/main/chapters/b.ipynb)"),
    ("{numref}`fig-a` and {numref}`Fig %s <fig-a>`", "Figure 1.2 and Fig 1.2"),
    ("{cite:t}`k`", "[Ho et al. (2020)](https://arxiv.org/abs/1)"),
    ("{cite:p}`k`", "([Ho et al., 2020](https://arxiv.org/abs/1))"),
    ("$$\nx\n= y\n$$ (eq:a)", "$$\nx = y \\tag{1.2}\n$$"),
    (":::{admonition} Head\n:class: tip\nBody $x$.\n:::", "> **Head**\n>\n> Body $x$."),
    (":::{dropdown} Head\nBody\n:::", "<details>\n<summary><b>Head</b></summary>\n\nBody\n\n</details>"),
    (":::{prf:theorem} T\n:label: thm-a\nBody\n:::", "> **Theorem 1.2** (T)\n>\n> Body"),
    (":::{prf:proof}\nBody\n:::", "> *Proof.* Body ∎"),
    (":::{exercise} E\n:label: ex-a\nBody\n:::", "> **Exercise 1.2** (E)\n>\n> Body"),
    (":::{solution} ex-a\n:class: dropdown\nBody\n:::",
     "<details>\n<summary><b>Solution to Exercise 1.2</b></summary>\n\nBody\n\n</details>"),
    (":::{list-table} T\n:name: tab-a\n* - a\n  - b\n* - 1\n  - 2\n:::",
     "**Table 1.2** T\n\n| a | b |\n| --- | --- |\n| 1 | 2 |"),
    ("{py:func}`minigen.ddpm.DDPM`", "`minigen.ddpm.DDPM`"),
])
def test_made_plain(myst, plain):
    assert Plain("chapters/a", LABELS, BIB, "https://github.com/a/b", "main").cell(myst) == plain
