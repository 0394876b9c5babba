"""Rebuild chapters/*.ipynb from chapters/*.md.

    python tools/chapters.py [--no-run] [--check] [name ...]

x.md is the only source. x.ipynb is generated: its outputs by execution, its prose such that Colab and GitHub show it.
--no-run keeps the stored outputs (refused for a chapter whose code changed); --check writes nothing and exits 1 if a
notebook is out of date.
"""
import argparse
import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = ROOT / "chapters"
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "book" / "_ext")]
from chapters_md import read  # noqa: E402
from plain import Plain, bibliography, raw_myst  # noqa: E402

CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
REPO, BRANCH = CONFIG["repository"]["url"].rstrip("/"), CONFIG["repository"]["branch"]
SLUG = REPO.removeprefix("https://github.com/")
BADGE = ("[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
         f"(https://colab.research.google.com/github/{SLUG}/blob/{BRANCH}/chapters/%s)")
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
WIDGET = "application/vnd.jupyter.widget-view+json"
FOLDED = {"hide-input", "hide-cell"}
HIDDEN = {"remove-output", "remove-cell"}


def source(md):
    """The notebook that the text of a chapter describes, without outputs."""
    return read(md.read_text(encoding="utf-8"))


def code(nb):
    return [c for c in nb.cells if c.cell_type == "code"]


def stored(md):
    """The notebook beside a chapter; None where it is missing or the chapter's code has changed since."""
    path = md.with_suffix(".ipynb")
    if not path.exists():
        return None
    old = nbformat.read(path, as_version=4)
    return old if [c.source for c in code(old)] == [c.source for c in code(source(md))] else None


def execute(md):
    """Run a chapter on the CPU. A live widget is dead without its kernel, so its output is not kept."""
    from nbclient import NotebookClient

    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ.update(CUDA_VISIBLE_DEVICES="", PYDEVD_DISABLE_FILE_VALIDATION="1", OMP_WAIT_POLICY="PASSIVE")
    nb = source(md)
    nb.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    NotebookClient(nb, timeout=900, kernel_name="python3", record_timing=False, coalesce_streams=True,
                   extra_arguments=["--log-level=ERROR"], resources={"metadata": {"path": str(CHAPTERS)}}).execute()
    for cell in code(nb):
        if any(WIDGET in o.get("data", {}) for o in cell.outputs):
            cell.outputs = []
    return nb


def labels():
    """What every reference of the book says, as the last numbering build found it."""
    path = CHAPTERS / "labels.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def number():
    """Let the book number its figures, equations and theorems, and write chapters/labels.json."""
    build = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(ROOT), "--all",
             "--builder", "custom", "--custom-builder", "dummy", "--path-output", str(ROOT / "_build" / "labels")]
    done = subprocess.run(build, env=dict(os.environ, BOOK_LABELS="write"), capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


def glued(nb):
    """The values that the cells of a notebook stored by name: {name: text}."""
    outputs = [o for c in code(nb) for o in c.outputs if o.get("metadata", {}).get("scrapbook")]
    return {o.metadata["scrapbook"]["name"]: next((v for k, v in o["data"].items() if k.endswith("text/plain")), "??")
            for o in outputs}


def code_cell(cell, done, index, folded):
    """A code cell of the plain notebook: the source of the chapter, the outputs of its execution."""
    tags = list(cell.metadata.get("tags", []))
    if HIDDEN & set(tags) and not done.outputs:
        tags.append("nbval-ignore-output")  # a live widget may show itself again
    meta = {"tags": tags} if tags else {}
    if folded:
        meta.update(cellView="form", jupyter={"source_hidden": True})  # Colab, JupyterLab
    new = nbformat.v4.new_code_cell(cell.source, id=f"code-{index}", metadata=meta)
    new.outputs, new.execution_count = copy.deepcopy(done.outputs), done.execution_count
    return new


def plain(md, outputs, labels, bib):
    """The notebook for Colab: the cells of `md` made plain, with the outputs of the notebook `outputs`."""
    done = iter(code(outputs))
    convert = Plain("chapters/" + md.stem, labels, bib, REPO, BRANCH, glued(outputs))
    nb = nbformat.v4.new_notebook(metadata={
        "kernelspec": KERNEL, "language_info": {"name": "python", "pygments_lexer": "ipython3"}})

    def prose(text):
        if left := raw_myst(text):
            raise ValueError(f"{md.name}: {left} left in:\n{text}")
        if text.strip():
            nb.cells.append(nbformat.v4.new_markdown_cell(text, id=f"text-{len(nb.cells)}"))

    for cell in source(md).cells:
        if cell.cell_type == "markdown":
            text = convert.cell(cell.source)
            if not nb.cells:  # the badge, under the title
                title, _, rest = text.partition("\n")
                text = f"{title}\n\n{BADGE % md.with_suffix('.ipynb').name}\n{rest}".rstrip()
            prose(text)
            continue
        folded = convert.in_solution or FOLDED & set(cell.metadata.get("tags", []))
        nb.cells.append(code_cell(cell, next(done), len(code(nb)), folded))
        if figure := cell.metadata.get("mystnb", {}).get("figure"):
            prose(convert.caption(figure.get("name"), convert.inline(figure.get("caption", "").strip())))
    nbformat.validate(nb)
    return nbformat.writes(nb) + "\n"


def sources():
    return sorted(CHAPTERS.glob("*.md"))


def stale():
    """Chapters whose .ipynb is not what the .md, the stored outputs and labels.json give."""
    bib, lab, out = bibliography(ROOT / CONFIG["bibtex_bibfiles"][0]), labels(), []
    for md in sources():
        old = stored(md)
        if old is None or plain(md, old, lab, bib) != md.with_suffix(".ipynb").read_text(encoding="utf-8"):
            out.append(md.name)
    return out


def executed(md, run):
    """The executed notebook of a chapter, fresh or as stored."""
    if not run:
        return stored(md) or sys.exit(f"{md.name}: its code changed, run make chapters ONLY={md.stem}")
    start = time.time()
    nb = execute(md)
    nbformat.write(nb, md.with_suffix(".ipynb"))  # figures are numbered where their outputs are stored
    print(f"{md.name}: executed in {time.time() - start:.1f} s", flush=True)
    return nb


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-run", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("names", nargs="*")
    a = parser.parse_args(argv)
    if a.check:
        print("out of date:", ", ".join(bad := stale()) or "nothing")
        return int(bool(bad))
    done = {md: executed(md, not a.no_run and (not a.names or any(n in md.name for n in a.names))) for md in sources()}
    number()
    bib, lab = bibliography(ROOT / CONFIG["bibtex_bibfiles"][0]), labels()
    for md, nb in done.items():
        path, text = md.with_suffix(".ipynb"), plain(md, nb, lab, bib)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.name}, {len(text) // 1024} KB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
