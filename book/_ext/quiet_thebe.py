"""Drop sphinx-thebe's scripts: Jupyter Book 1 always loads that extension, declares its constants twice
(a SyntaxError on every page) and this book has no Thebe button."""


def _is_thebe(script):
    body = str(getattr(script, "attributes", {}).get("body", ""))
    return "THEBE_JS_URL" in body or "sphinx-thebe.js" in str(getattr(script, "filename", script))


def _drop(app, pagename, templatename, context, doctree):
    context["script_files"] = [s for s in context.get("script_files", []) if not _is_thebe(s)]


def setup(app):
    app.connect("html-page-context", _drop, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
