"""MyST Markdown -> Markdown that Colab, GitHub and Jupyter show well. Raises PlainError on what it does not know.

`Plain` converts the prose of one chapter: roles become the text of the book (numbers from chapters/labels.json),
directives become quotes, folds, tables. `raw_myst` names what is left of MyST: nothing slips through in silence.
"""
import html
import re

import yaml


class PlainError(ValueError):
    """A construct that the plain notebook cannot show."""


ADMONITIONS = {"note", "tip", "hint", "important", "warning", "caution", "danger", "attention", "error", "seealso",
               "admonition", "topic", "sidebar", "margin", "dropdown"}
THEOREMS = {"prf:" + kind for kind in (
    "theorem", "lemma", "proposition", "corollary", "definition", "axiom", "remark", "example", "algorithm",
    "conjecture", "criterion", "observation", "property", "assumption")}
DROPPED = {"toctree", "contents", "tableofcontents", "bibliography", "index", "exercise-end"}
VERBATIM = {"kbd", "code", "file", "func", "py:func", "py:class", "py:mod", "py:obj", "py:meth", "py:attr"}

FENCE = re.compile(r"^(\s*)(`{3,}|~{3,}|:{3,})(?:\{([^}]+)\}[ \t]*)?(.*)$")
TARGET = re.compile(r"\s*\([\w:.-]+\)=\s*$|%(\s|$)")  # and comments
DISPLAY_END = re.compile(r"\$\$[ \t]*(\([^()]+\))?[ \t]*$")
ENVIRONMENT = re.compile(r"\s*\\begin\{(align|gather|equation|alignat|multline|eqnarray)(\*?)\}")
FOOTNOTE = re.compile(r"\[\^([^\]]+)\]:\s+(.*)")
OPTION = re.compile(r"\s*:([\w-]+):\s*(.*)$")
STARTS_BLOCK = re.compile(r"[\s>]*(\$\$|[-*+] |\d+\. |`{3}|:{3})")
CODE_SPAN = re.compile(r"(?<!\})(`+)(?!`).+?(?<!`)\1(?!`)")
# what must not be touched inside a paragraph (code, math), or is a role
INLINE = re.compile(r"(?P<code>(?P<t>`{2,})(?!`).+?(?<!`)(?P=t)(?!`))"
                    r"|\{(?P<role>[a-zA-Z][\w:.+-]*)\}`(?P<body>[^`]+)`"
                    r"|(?P<c1>`[^`]+`)|(?P<math>(?<!\\)\$[^$]+(?<!\\)\$)", re.S)
TITLED = re.compile(r"^(.*?)\s*<([^<>]+)>$", re.S)

# what may not be left over: (name, pattern), searched after code has been taken out (and math, for the last group)
RAW = [
    ("role", r"\{[a-zA-Z][\w:.+-]*\}`"),
    ("directive", r"(?m)^[> \t]*(?::{3,}|`{3,}\{|~{3,}\{)"),
    ("option", r"(?m)^[> \t]*:(?:label|class|name|tags|width|alt|nonumber):"),
    ("target", r"(?m)^[> \t]*\([\w:.-]+\)=[ \t]*$"),
    ("math label", r"(?m)\$\$[ \t]*\([\w:.-]+\)[ \t]*$"),
    ("comment", r"(?m)^%\s"),
    ("block break", r"(?m)^\+\+\+"),
    ("missing number", r"\?\?"),
    ("math right after a link", r"\]\([^)]*\)\$"),  # Colab does not set it: googlecolab/colabtools issue 2075
]
RAW_TEXT = [
    ("footnote", r"\[\^[^\]]+\]"),
    ("substitution", r"\{\{.*?\}\}"),
    ("definition list", r"(?m)^:[ \t]+\S"),
    ("attributes", r"[\])]\{[^}]*\}"),
    ("relative link", r"\]\((?!https?://|#|mailto:|attachment:)[^)]*\)"),
    ("bare environment", r"(?m)^\s*\\begin\{"),
]


def raw_myst(text):
    """Names of the MyST constructs left in the Markdown of a plain cell."""
    text = re.sub(r"(?ms)^([ \t>]*)(`{3,}|~{3,})(?!\{).*?^[ \t>]*\2[ \t]*$", "", text)
    text = CODE_SPAN.sub("", text)
    found = [name for name, pattern in RAW if re.search(pattern, text)]
    text = re.sub(r"(?s)\$\$.*?\$\$", "", text)
    text = re.sub(r"(?s)(?<!\\)\$[^$]+\$", "", text)
    return found + [name for name, pattern in RAW_TEXT if re.search(pattern, text)]


def options(body):
    """Split the lines of a directive into its options and its content."""
    opts, k = {}, 0
    if body and body[0].strip() == "---":
        k = next(n for n in range(1, len(body)) if body[n].strip() == "---")
        opts, k = yaml.safe_load("\n".join(body[1:k])) or {}, k + 1
    else:
        while k < len(body) and (m := OPTION.match(body[k])):
            opts[m[1]] = m[2].strip()
            k += 1
    while k < len(body) and not body[k].strip():
        k += 1
    return opts, body[k:]


class Plain:
    """Converts the Markdown cells of one chapter, in order (footnotes and gated solutions have state).

    `doc` is the chapter ("chapters/05_ddpm"), `labels` what references say, `bib` what citations say, `repo` and
    `branch` where links to other pages lead, `glue` the values stored by cells.
    """

    def __init__(self, doc, labels, bib, repo, branch, glue=None):
        self.doc, self.labels, self.bib, self.glue = doc, labels, bib, glue or {}
        self.repo, self.branch = repo.rstrip("/"), branch
        self.notes, self.in_solution = {}, False

    def cell(self, text):
        """The plain text of one Markdown cell."""
        return re.sub(r"\n{3,}", "\n\n", "\n".join(self.block(text.split("\n")))).strip("\n")

    # -- places and labels

    def blob(self, path):
        return f"{self.repo}/blob/{self.branch}/{path}"

    def raw(self, path):
        return self.repo.replace("https://github.com", "https://raw.githubusercontent.com") + f"/{self.branch}/{path}"

    def page(self, doc):
        return self.blob(doc + (".ipynb" if doc.startswith("chapters/") else ".md"))

    def resolve(self, target):
        """A path of the repository, from one that is relative to the chapter (or starts with / for the root)."""
        if target.startswith("/"):
            return target[1:]
        parts = self.doc.split("/")[:-1]
        for part in target.split("/"):
            if part == "..":
                parts = parts[:-1]
            elif part not in ("", "."):
                parts.append(part)
        return "/".join(parts)

    def label(self, name):
        return self.labels.get(name) or {"doc": self.doc, "text": "??", "number": "??", "title": "??"}

    def link(self, text, doc):
        return text if doc == self.doc else f"[{text}]({self.page(doc)})"

    @staticmethod
    def title(entry):
        """What {ref} and [](#label) say: the title or caption, the number where there is none."""
        return entry["text"] if entry.get("title") in ("", "Exercise", None) else entry["title"]

    def numbered(self, kind, name, opts):
        """The head of a theorem or exercise, "Theorem 5.1"."""
        if "nonumber" in opts:
            return kind.capitalize()
        if "label" not in opts:
            raise PlainError(f"{{{name}}} needs :label: (or :nonumber:)")
        return f"{kind.capitalize()} {self.label(opts['label'])['number']}"

    def caption(self, label, text):
        """A caption with its number in bold."""
        return (f"**{self.label(label)['text']}** " if label else "") + self.inline(text)

    # -- inside a paragraph

    def inline(self, text):
        """Roles, links, footnote marks of a paragraph; code and math stay as they are."""
        if "$$" in re.sub(r"(?s)(`+).+?\1", "", text):
            raise PlainError("$$ inside a line of text: put the display on lines of its own")
        out, last = [], 0
        for m in INLINE.finditer(text):
            out += [self.words(text[last:m.start()]), self.role(m["role"], m["body"].strip()) if m["role"] else m[0]]
            last = m.end()
        return "".join(out) + self.words(text[last:])

    def words(self, t):
        if "{{" in t:
            raise PlainError("substitution {{ }}")
        t = re.sub(r"\[([^\]]*)\]\{[.#\w][^}\n]*\}", r"\1", t)  # bracketed span
        t = re.sub(r"(?<=[\])])\{[.#\w][^}\n]*\}", "", t)  # attributes
        t = re.sub(r"(?m)^(\S.*)\n:[ \t]+", r"**\1**: ", t)  # definition list
        t = re.sub(r"\[\^([^\]]+)\]", lambda m: self.note(m[1]), t)
        return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]*)\)", self.markdown_link, t)

    def note(self, name):
        return f"<sup>{self.notes.setdefault(name, len(self.notes) + 1)}</sup>"

    def markdown_link(self, m):
        bang, text, url = m.groups()
        if re.match(r"(https?:|mailto:)", url):
            return m[0]
        if bang:
            return f"![{text}]({self.raw(self.resolve(url))})"
        if url.startswith("#") or url in self.labels:
            entry = self.label(url.lstrip("#"))
            return self.link(text or self.title(entry), entry["doc"])
        path = self.resolve(url.partition("#")[0])
        doc = re.sub(r"\.(md|ipynb)$", "", path)
        if "/" + doc in self.labels:
            return f"[{text or self.labels['/' + doc]['title']}]({self.page(doc)})"
        return f"[{text}]({self.blob(path)})"

    def role(self, name, body):
        """The text of a role, as the book shows it."""
        text, target = m.groups() if (m := TITLED.match(body)) else (None, body)
        if name in ("eq", "numref", "ref", "prf:ref"):
            return self.reference(name, text, target)
        if name == "doc":
            doc = self.resolve(target)
            return f"[{text or self.label('/' + doc)['title']}]({self.page(doc)})"
        if name in ("cite", "cite:p", "cite:t"):
            return self.citation([k.strip() for k in body.split(",")], name == "cite:t")
        if name in VERBATIM:
            return f"`{(text or target).lstrip('~')}`"
        if name in ("glue", "glue:text"):
            key, _, spec = body.partition(":")
            value = self.glue.get(key, "??")
            return format(float(value), spec) if spec and key in self.glue else value.strip("'\"")
        simple = {"term": text or target, "math": f"${body}$", "abbr": body, "index": "",
                  "sub": f"<sub>{body}</sub>", "sup": f"<sup>{body}</sup>"}
        if name not in simple:
            raise PlainError(f"role {{{name}}}")
        return simple[name]

    def reference(self, name, text, target):
        entry = self.label(target)
        if name == "numref" and text:
            text = re.sub(r"%s|\{number\}", entry.get("number", "??"), text)
        if not text:
            text = self.title(entry) if name == "ref" else entry.get("text") or entry["title"]
        return self.link(text, entry["doc"])

    def citation(self, keys, in_text):
        for key in keys:
            if key not in self.bib:
                raise PlainError(f"unknown citation {key}")
        form = "{names} ({year})" if in_text else "{names}, {year}"
        said = [f"[{form.format(**e)}]({e['url']})" if e["url"] else form.format(**e) for e in map(self.bib.get, keys)]
        return " and ".join(said) if in_text else f"({'; '.join(said)})"

    # -- blocks

    def block(self, lines, quoted=False):
        """The plain lines of a block; `quoted` inside quotes and folds, where a formula must stay on one line."""
        out, para, i = [], [], 0

        def flush():
            if para:
                out.extend(self.inline("\n".join(para)).split("\n"))
                para.clear()

        takers = [(FENCE, self.take_fence), (re.compile(r"\s*\$\$"), self.take_display),
                  (ENVIRONMENT, self.take_environment), (TARGET, lambda lines, i, quoted: ([], i + 1))]
        while i < len(lines):
            take = next((take for pattern, take in takers if pattern.match(lines[i])), None)
            if take or not lines[i].strip():
                flush()
            if take:
                new, i = take(lines, i, quoted)
                out += new
                continue
            if m := FOOTNOTE.match(lines[i]):
                flush()
                para.append(f"{self.note(m[1])} {m[2]}")
            elif lines[i].strip():
                para.append(lines[i])
            else:
                out.append("")
            i += 1
        flush()
        return out

    def take_fence(self, lines, i, quoted):
        indent, mark, name, rest = FENCE.match(lines[i]).groups()
        end = re.compile(rf"^\s*{re.escape(mark[0])}{{{len(mark)},}}\s*$")
        j = next((k for k in range(i + 1, len(lines)) if end.match(lines[k])), None)
        if j is None:
            raise PlainError(f"unclosed {lines[i]!r}")
        if not name:
            if mark[0] == ":":
                raise PlainError("::: without a {name}")
            return lines[i:j + 1], j + 1
        body = [x[len(indent):] if x.startswith(indent) else x.lstrip() for x in lines[i + 1:j]]
        return ["", *[(indent + x).rstrip() for x in self.directive(name, rest.strip(), body, quoted)], ""], j + 1

    def take_display(self, lines, i, quoted):
        after = lines[i][lines[i].index("$$") + 2:]
        j = i if DISPLAY_END.search(after) else next(
            (k for k in range(i + 1, len(lines)) if DISPLAY_END.search(lines[k])), None)
        if j is None:
            raise PlainError(f"unclosed {lines[i]!r}")
        m = re.match(r"(?s)(\s*)\$\$(.*)\$\$[ \t]*(?:\(([^()]+)\))?\s*$", "\n".join(lines[i:j + 1]))
        return self.math(m[2], m[3], quoted, m[1]), j + 1

    def take_environment(self, lines, i, quoted):
        name, star = ENVIRONMENT.match(lines[i]).groups()
        if not star:
            raise PlainError(f"bare {name} has a number but no label: write $$ ... $$ (label)")
        j = next(k for k in range(i, len(lines)) if rf"\end{{{name}*}}" in lines[k])
        inner = {"align": "aligned", "gather": "gathered"}[name]
        return self.math("\n".join(lines[i:j + 1]).replace(name + "*", inner), None, quoted), j + 1

    def math(self, tex, label, quoted, indent=""):
        """A display, with its number as a tag."""
        tex = re.sub(r"(?m)(?<!\\)%.*$", "", tex).strip("\n")  # no TeX comments: lines may be joined
        if label:
            tex = tex.rstrip() + rf" \tag{{{self.label(label)['number']}}}"
        if quoted:  # Jupyter takes the "> " of later lines for a part of the formula: one line
            return ["", indent + "$$" + " ".join(filter(None, map(str.strip, tex.split("\n")))) + "$$", ""]
        lines = []
        for x in filter(None, map(str.strip, tex.split("\n"))):
            if lines and x[0] in "-+*=>#":  # Colab would read a heading or a list (googlecolab/colabtools issue 5581)
                lines[-1] += " " + x
            else:
                lines.append(x)
        return ["", indent + "$$", *[indent + x for x in lines], indent + "$$", ""]

    # -- directives

    def directive(self, name, arg, body, quoted):
        """The plain lines of a directive."""
        if name in DROPPED:
            return []
        opts, body = options(body)
        if name in ADMONITIONS:
            return self.admonition(name, arg, opts, body)
        if name in THEOREMS:
            head = self.numbered(name.removeprefix("prf:"), name, opts)
            return self.quote(f"**{head}**{self.in_brackets(arg)}", body)
        if name not in self.HANDLERS:
            raise PlainError(f"directive {{{name}}}")
        return self.HANDLERS[name](self, name, arg, opts, body)

    def in_brackets(self, arg):
        return f" ({self.inline(arg)})" if arg else ""

    def quote(self, head, body):
        inner = [*([head, ""] if head else []), *self.block(body, quoted=True)]
        while inner and not inner[-1].strip():
            inner.pop()
        return [("> " + x).rstrip() for n, x in enumerate(inner) if x.strip() or inner[n - 1].strip()]

    def details(self, head, body):
        return ["<details>", f"<summary><b>{head}</b></summary>", "", *self.block(body, quoted=True), "", "</details>"]

    def admonition(self, name, arg, opts, body):
        head = self.inline(arg) if arg else name.capitalize().replace("Seealso", "See also")
        if name == "dropdown" or "dropdown" in str(opts.get("class", "")):
            return self.details(html.escape(head, quote=False), body)
        return self.quote(f"**{head}**", body)

    def proof(self, name, arg, opts, body):
        head = f"*Proof{self.in_brackets(arg)}.*"
        while body and not body[-1].strip():
            body = body[:-1]
        if not body or STARTS_BLOCK.match(body[0]):
            return self.quote(head, [*body, "", "∎"])
        body = [f"{head} {body[0]}", *body[1:]]
        on_a_line = re.search(r"\$\$|`{3}|:{3}", body[-1])
        return self.quote(None, [*body, "", "∎"] if on_a_line else [*body[:-1], body[-1] + " ∎"])

    def exercise(self, name, arg, opts, body):
        head = f"**{self.numbered('exercise', name, opts)}**{self.in_brackets(arg)}"
        return self.quote(head, body) if name == "exercise" else [head]

    def solution(self, name, arg, opts, body):
        self.in_solution = name == "solution-start"
        if name == "solution-end":
            return []
        head = f"Solution to {self.label(arg).get('text', '??')}"
        return self.details(head, body) if name == "solution" else [f"**{head}**"]

    def display(self, name, arg, opts, body):
        return self.math("\n".join(body), opts.get("label"), False)

    def figure(self, name, arg, opts, body):
        src = arg if arg.startswith("http") else self.raw(self.resolve(arg))
        image = [f"![{opts.get('alt', '')}]({src})"]
        caption = "\n".join(body).strip()
        return image if name == "image" else [*image, "", self.caption(opts.get("name"), caption)]

    def table(self, name, arg, opts, body):
        return [self.caption(opts.get("name"), arg), "", *self.block(body)]

    def list_table(self, name, arg, opts, body):
        rows = []
        for x in body:
            if m := re.match(r"\s*\*\s+-\s*(.*)", x):
                rows.append([m[1]])
            elif m := re.match(r"\s+-\s*(.*)", x):
                rows[-1].append(m[1])
            elif x.strip():
                rows[-1][-1] += " " + x.strip()
        lines = ["| " + " | ".join(self.inline(c) for c in r) + " |" for r in rows]
        lines.insert(1, "|" + " --- |" * len(rows[0]))
        return [self.caption(opts.get("name"), arg), "", *lines] if arg or "name" in opts else lines

    def listing(self, name, arg, opts, body):
        return [f"```{arg}", *body, "```"]

    def glossary(self, name, arg, opts, body):
        return self.block(re.sub(r"(?m)^(\S.*)\n[ \t]+(?::\s+)?", r"**\1**: ", "\n".join(body)).split("\n"))

    def tabs(self, name, arg, opts, body):
        return [*([f"**{arg}**", ""] if name == "tab-item" else []), *self.block(body)]

    HANDLERS = {
        "prf:proof": proof, "exercise": exercise, "exercise-start": exercise, "solution": solution,
        "solution-start": solution, "solution-end": solution, "math": display, "figure": figure, "image": figure,
        "table": table, "list-table": list_table, "code-block": listing, "code": listing, "sourcecode": listing,
        "glossary": glossary, "tab-set": tabs, "tab-item": tabs,
    }


def bibliography(path):
    """{key: {names, year, url}} with the author-year form of the book's references."""
    from pybtex.database import parse_file
    from pybtex.richtext import Text

    def name(person):
        return Text.from_latex(" ".join(person.prelast_names + person.last_names)).render_as("text")

    out = {}
    for key, entry in parse_file(str(path)).entries.items():
        last = [name(p) for p in entry.persons.get("author", entry.persons.get("editor", []))]
        f = entry.fields
        link = {"eprint": "https://arxiv.org/abs/", "doi": "https://doi.org/", "url": ""}
        names = f"{last[0]} et al." if len(last) > 2 else " and ".join(last)
        url = next((link[k] + f[k] for k in link if k in f), "")
        out[key] = {"names": names, "year": f.get("year", "n.d."), "url": url}
    return out
