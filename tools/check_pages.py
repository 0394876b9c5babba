"""Look at the built book in headless Chromium, from file:// and without a network.

    python tools/check_pages.py [--html _build/html] [--shots FOLDER] [--require] [page ...]

Every page is opened wide and phone-wide, in light and in dark mode. Reported: requests that leave the disk, errors on
the console, formulas that are not set, cut off or wider than the page, pictures without a text alternative, pages wider
than the window, links into nowhere, and frame players that do not move by button and by arrow keys.
"""
import argparse
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote, urlparse

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
WINDOWS = {"wide": (1280, 900), "phone": (390, 844)}
SKIPPED_PAGES = {"genindex.html", "search.html", "py-modindex.html", "index.html"}  # written by Sphinx, not by us

# the words of the article: no code, no formula, no script
WORDS = """() => {
  const copy = document.querySelector('article').cloneNode(true);
  copy.querySelectorAll('pre, code, script, style, mjx-container, .headerlink').forEach(e => e.remove());
  return copy.textContent }"""
RAW = {"a raw formula": r"\\\(|\\\[|\$\$|(?<![\\\w])\$[^\s$](?:[^$\n]*[^\s$])?\$", "a raw role": r"\{[a-z:]+\}`",
       "a raw directive": r"(?m)^\s*:{3,}"}
PICTURES = "() => [...document.querySelectorAll('article img')].map(e => e.getAttribute('alt') || '')"
MATH = """() => ({sources: document.querySelectorAll('article .math').length,
  unset: [...document.querySelectorAll('article .math')].filter(e => !e.querySelector('mjx-container')).length,
  errors: document.querySelectorAll('mjx-merror, [data-mjx-error]').length})"""
# formulas that go on beyond an edge where nobody can scroll to, folds opened for the look
CUT = """() => {
  const folds = [...document.querySelectorAll('article details:not([open])')];
  folds.forEach(f => f.open = true);
  const cut = [...document.querySelectorAll('article mjx-math')].filter(m => {
    const right = m.getBoundingClientRect().right;
    for (let p = m.parentElement; p && p != document.body; p = p.parentElement) {
      const flow = getComputedStyle(p).overflowX;
      if (flow == 'auto' || flow == 'scroll') return false;
      if (flow != 'visible' && right > p.getBoundingClientRect().right + 1) return true;
    }
    return right > innerWidth + 1 });
  const names = cut.map(m => m.parentElement.querySelector('mjx-assistive-mml')?.textContent || '?');
  folds.forEach(f => f.open = false);
  return names }"""
# formulas on lines of their own that are wider than their place: one has to scroll to read them
WIDE = """() => {
  const folds = [...document.querySelectorAll('article details:not([open])')];
  folds.forEach(f => f.open = true);
  const wide = [...document.querySelectorAll('article div.math mjx-container')]
    .filter(c => c.scrollWidth > c.clientWidth + 8)
    .map(c => c.querySelector('mjx-assistive-mml')?.textContent || '?');
  folds.forEach(f => f.open = false);
  return wide }"""
LINKS = "() => [...document.querySelectorAll('article a[href], nav a[href]')].map(e => e.href)"
WIDTH = "() => [document.documentElement.scrollWidth, window.innerWidth]"
WIDEST = """() => [...document.querySelectorAll('body *')]
  .filter(e => { if (e.getBoundingClientRect().right <= innerWidth + 1) return false;
    for (let p = e.parentElement; p; p = p.parentElement)
      if (p != document.body && getComputedStyle(p).overflowX != 'visible') return false;
    return true })
  .map(e => e.tagName.toLowerCase() + '.' + e.className).slice(0, 3).join(', ')"""
SHOWN = """f => [f.querySelector('output').textContent,
  [...f.querySelectorAll('img')].findIndex(i => getComputedStyle(i).display != 'none')]"""


def browser_path():
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def player_problems(page, player):
    """A frame player must change picture and label by the arrow keys and by its button, and stop again."""
    player.scroll_into_view_if_needed()
    slider, button = player.query_selector("input[type=range]"), player.query_selector("button")
    before = player.evaluate(SHOWN)
    slider.focus()
    page.keyboard.press("ArrowLeft" if slider.input_value() == slider.get_attribute("max") else "ArrowRight")
    by_key = player.evaluate(SHOWN)
    if before[0] == by_key[0] or before[1] == by_key[1]:
        yield "a frame player does not move by the arrow keys"
    button.click()
    try:
        page.wait_for_function("([f, old]) => f.querySelector('output').textContent != old",
                               arg=[player, by_key[0]], timeout=4000)
    except Exception:
        yield "a frame player does not play"
    if button.get_attribute("aria-label") == "Pause":
        button.click()


def link_problems(links, html):
    for link in sorted(set(links)):
        url = urlparse(link)
        if url.scheme != "file":
            continue
        path = Path(unquote(url.path))
        if not path.exists():
            yield f"a link into nowhere: {path}"
        elif url.fragment and path.suffix == ".html" and html in path.parents:
            ids = re.findall(r'\b(?:id|name)="([^"]+)"', path.read_text(encoding="utf-8"))
            if unquote(url.fragment) not in ids:
                yield f"a link to a missing place: {path.name}#{url.fragment}"


def page_problems(page, html):
    """What is wrong on the page that is open."""
    math = page.evaluate(MATH)
    if math["sources"] and page.evaluate("() => Boolean(window.MathJax?.startup?.promise)"):
        said = page.evaluate("() => MathJax.startup.promise.then(() => '', e => String(e))")
        math = page.evaluate(MATH)
        if said:
            yield f"MathJax: {said}"
    if math["unset"] or math["errors"]:
        yield f"{math['unset']} formulas not set, {math['errors']} with errors"
    if cut := page.evaluate(CUT):
        yield f"{len(cut)} formulas cut off, the first: {cut[0][:60]!r}"
    if wide := page.evaluate(WIDE):
        yield f"{len(wide)} formulas wider than the page, the first: {wide[0][:60]!r}"
    words = page.evaluate(WORDS)
    for name, pattern in RAW.items():
        if found := re.search(pattern, words):
            yield f"{name}: {found[0][:60]!r}"
    bad = [alt for alt in page.evaluate(PICTURES) if len(alt) < 8 or re.search(r"\.(png|svg|jpe?g|webp)$", alt)]
    if bad:
        yield f"{len(bad)} pictures without a text alternative"
    yield from link_problems(page.evaluate(LINKS), html)
    for player in page.query_selector_all("figure.mg-player"):
        yield from player_problems(page, player)
    scroll, window = page.evaluate(WIDTH)
    if scroll > window + 1:
        yield f"wider than the window ({scroll} > {window}): {page.evaluate(WIDEST)}"


def look(browser, path, html, window, scheme, shots):
    """All problems of one page in one window; a picture of it where wanted."""
    problems = []
    context = browser.new_context(viewport=dict(zip(("width", "height"), WINDOWS[window])), color_scheme=scheme,
                                  has_touch=window == "phone")
    page = context.new_page()
    page.on("request", lambda r: r.url.startswith(("file:", "data:", "blob:")) or problems.append(f"request {r.url}"))
    page.on("console", lambda m: m.type == "error" and problems.append(f"console: {m.text}"))
    page.on("requestfailed", lambda r: problems.append(f"missing: {r.url}"))
    page.on("pageerror", lambda e: problems.append(f"script error: {e}"))
    page.goto(path.as_uri(), wait_until="load")
    problems += page_problems(page, html)
    if page.evaluate("document.documentElement.dataset.theme") != scheme:
        problems.append(f"does not follow the {scheme} mode of the system")
    if shots:
        page.evaluate("window.scrollTo(0, 0)")
        name = path.relative_to(html).with_suffix("").as_posix().replace("/", "-")
        page.screenshot(path=shots / f"{name}-{window}-{scheme}.png", full_page=True)
    context.close()
    return problems


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--html", type=Path, default=ROOT / "_build" / "html")
    parser.add_argument("--shots", type=Path, help="keep a picture of every page here")
    parser.add_argument("--require", action="store_true", help="a missing browser is a failure")
    parser.add_argument("pages", nargs="*", help="parts of page names; all pages if none is given")
    a = parser.parse_args(argv)
    html, chromium = a.html.resolve(), browser_path()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sync_playwright = None
    if not chromium or not sync_playwright:
        print(f"check_pages: skipped, {'no Chromium' if not chromium else 'no playwright'} here")
        return int(a.require)
    paths = [p for p in sorted(html.rglob("*.html")) if p.relative_to(html).parts[0] in ("book", "chapters")
             and p.name not in SKIPPED_PAGES and (not a.pages or any(n in p.as_posix() for n in a.pages))]
    if not paths:
        print(f"check_pages: no pages in {html}; run make book first")
        return 1
    if a.shots:
        a.shots.mkdir(parents=True, exist_ok=True)
    failed = 0
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, headless=True, args=FLAGS)
        for path in paths:
            for window in WINDOWS:
                for scheme in ("light", "dark"):
                    problems = look(browser, path, html, window, scheme, a.shots)
                    failed += bool(problems)
                    for p in dict.fromkeys(problems):
                        print(f"{path.relative_to(html)} ({window}, {scheme}): {p}", flush=True)
        browser.close()
    print(f"check_pages: {len(paths)} pages, each in 2 windows and 2 modes: "
          f"{4 * len(paths) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
