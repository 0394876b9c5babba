"""Build the book from chapters/*.md with the outputs stored in chapters/*.ipynb, without a kernel.

Also: offer the plain notebook for download, and keep chapters/labels.json (the numbers that the plain
notebooks quote) equal to the numbers of the book.
"""
import json
import os
import shutil
from pathlib import Path

import nbformat
from docutils import nodes
from myst_nb.core.read import read_myst_markdown_notebook
from myst_parser.config.main import MdParserConfig
from sphinx.util import logging

LOG = logging.getLogger(__name__)
FOLDER = "chapters"
SYNTAX = MdParserConfig(enable_extensions={"amsmath", "colon_fence", "dollarmath"})


def read(text, ipynb=None):
    """The notebook of a chapter's text; its code cells get the outputs stored in `ipynb`."""
    nb = read_myst_markdown_notebook(text, config=SYNTAX, add_source_map=True)
    if ipynb is None:
        return nb
    code = [c for c in nb.cells if c.cell_type == "code"]
    try:
        stored = nbformat.read(ipynb, as_version=4)
        cells = [c for c in stored.cells if c.cell_type == "code"]
    except FileNotFoundError:
        cells = []
    if [c.source.strip() for c in code] != [c.source.strip() for c in cells]:
        LOG.warning("the code differs from the stored notebook %s: run python tools/chapters.py", ipynb)
        return nb
    for c, s in zip(code, cells):
        c.outputs, c.execution_count = s.outputs, s.execution_count
    if "widgets" in stored.metadata:
        nb.metadata["widgets"] = stored.metadata["widgets"]
    return nb


def builder_inited(app):
    # after myst-nb made its configuration: one reader per chapter. The key is a path suffix, here the whole path;
    # in conf.py it would also become a Sphinx source suffix, so it is set here. A name, not a function: it is pickled.
    for md in sorted((Path(app.srcdir) / FOLDER).glob("*.md")):
        stored = {"ipynb": str(md.with_suffix(".ipynb"))}
        app.env.mystnb_config.custom_formats[str(md)] = ("chapters_md.read", stored, False)


def source_read(app, docname, source):
    ipynb = Path(app.srcdir, docname + ".ipynb")
    if docname.startswith(FOLDER + "/") and ipynb.exists():
        app.env.note_dependency(str(ipynb))  # new outputs: read the chapter again


def labels(env):
    """What a reference to each label says: {label: {doc, text, number, title}}; documents under "/docname"."""
    out, trees = {}, {}
    fmt = env.config.numfig_format
    math = env.domaindata["math"]["objects"]
    for label, (doc, _) in math.items():
        for node_id, n in env.toc_fignumbers.get(doc, {}).get("displaymath", {}).items():
            if node_id == nodes.make_id("equation-" + label):
                num = ".".join(map(str, n))
                out[label] = {"doc": doc, "number": num, "text": f"({num})"}
    named = {}
    for label, (doc, node_id, title) in env.domaindata["std"]["labels"].items():
        named[label] = (doc, node_id, str(title))
    for label, (doc, node_id) in env.domaindata["std"]["anonlabels"].items():
        named.setdefault(label, (doc, node_id, ""))
    for label, v in getattr(env, "proof_list", {}).items():
        named[label] = (v["docname"], label, "")
    for label, (doc, node_id, title) in named.items():
        if doc not in env.found_docs or "-solution" in label:
            continue
        e = {"doc": doc, "title": title}
        for kind, ids in env.toc_fignumbers.get(doc, {}).items():
            if node_id in ids and kind != "displaymath":
                e["number"] = ".".join(map(str, ids[node_id]))
                text = fmt.get(kind, kind + " %s") % e["number"]
                e["text"] = text[0].upper() + text[1:]
        if "text" not in e and doc in env.toc_secnumbers:  # a section: its number is filed under its first id
            trees.setdefault(doc, env.get_doctree(doc))
            ids = next((s["ids"] for s in trees[doc].findall(nodes.section) if node_id in s["ids"]), [""])
            sec = env.toc_secnumbers[doc].get("#" + ids[0]) or (env.toc_secnumbers[doc].get("") if ids[0] else None)
        else:
            sec = None
        if sec:
            e["number"] = ".".join(map(str, sec))
            e["text"] = fmt["section"] % e["number"]
        out[label] = e
    for doc in env.found_docs:
        out["/" + doc] = {"doc": doc, "title": env.titles[doc].astext()}
    return dict(sorted(out.items()))


def check_consistency(app, env):
    path = Path(app.srcdir, FOLDER, "labels.json")
    new = json.dumps(labels(env), indent=0, ensure_ascii=False) + "\n"
    if os.environ.get("BOOK_LABELS") == "write":
        path.write_text(new, encoding="utf-8")
    elif not path.exists() or path.read_text(encoding="utf-8") != new:
        LOG.warning("%s is not what this build numbers: run python tools/chapters.py --no-run", path)


def page_context(app, pagename, templatename, context, doctree):
    ipynb = Path(app.srcdir, pagename + ".ipynb")
    if not pagename.startswith(FOLDER + "/") or not ipynb.exists():
        return
    target = Path(app.outdir, "_sources", pagename + ".ipynb")  # the theme put the MyST notebook there
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ipynb, target)
    for group in context.get("header_buttons", []):  # one plain button in place of the rocket menu
        if group.get("label") == "launch-buttons" and len(group["buttons"]) == 1:
            link = dict(group["buttons"][0], text="Open in Colab", icon="fas fa-rocket", label="colab")
            context["header_buttons"][context["header_buttons"].index(group)] = link


def setup(app):
    app.connect("builder-inited", builder_inited, priority=900)
    app.connect("source-read", source_read)
    app.connect("env-check-consistency", check_consistency)
    app.connect("html-page-context", page_context, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
