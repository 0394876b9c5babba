"""Numbers that come from runs have a result file, and the prose that tells of runs has no number of its own."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from minigen.__main__ import main
from minigen.recipe import TrainConfig
from tools import results as keep
from tools import runs as all_runs

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "book" / "results"
CHAPTER = ROOT / "chapters" / "09_cifar10.md"
FILES = sorted(RESULTS.glob("*.json"))

SECTIONS = (
    "What seconds buy",
    "Real runs",
    "What more time buys",
    "What a card buys",
    "With shipped weights",
    "Is your run on track?",
    "The rate of a card",
)
"""The headings of the chapter under which prose tells of our own runs."""

ALLOWED: dict[str, str] = {
    "2020": "the year of a paper",
    "10": "CIFAR-10, the name of the data",
    "1797": "the number of digits in the data",
    "157": "the largest noise level of DDPM, held by the test of its error",
}
"""Numbers that may stand there all the same, each with its reason or source."""

NUMBER = re.compile(r"(?<![\w.])[-−]?\d[\d,]*(?:\.\d+)?")


def prose(text: str, headings: tuple[str, ...]) -> str:
    """The text under the headings, without code, formulas, directives, roles and links."""
    parts = re.split(r"(?m)^(#{2,3} .*)$", text)
    kept = [body for head, body in zip(parts[1::2], parts[2::2], strict=True) if head.lstrip("# ") in headings]
    out = "\n".join(kept)
    for pattern in (r"(?ms)^```.*?^```", r"(?s)\$\$.*?\$\$", r"\$[^$\n]*\$", r"`[^`\n]*`", r"\{[\w:]+\}", r"\]\(\S*\)"):
        out = re.sub(pattern, " ", out)
    return out


def numbers(text: str) -> list[str]:
    """Every number that is typed in a text, without commas."""
    return [m[0].replace(",", "").replace("−", "-") for m in NUMBER.finditer(text)]


def leaves(value) -> list[float]:
    """All numbers in a result, without its long curves."""
    if isinstance(value, dict):
        return [x for k, v in value.items() if k != "curve" for x in leaves(v)]
    if isinstance(value, list):
        return [x for v in value for x in leaves(v)]
    return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


def strays(text: str, results: list[float], printed: set[str]) -> list[str]:
    """The numbers of a text that no result rounds to, no cell prints, and nobody allowed."""
    out = []
    for number in numbers(text):
        digits = len(number.partition(".")[2])
        known = any(round(x, digits) == float(number) for x in results)
        if not known and number not in ALLOWED and number not in printed:
            out.append(number)
    return out


def printed_by(notebook: Path) -> set[str]:
    """The numbers in the text outputs of a notebook."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(o.get("text", "")) for c in cells if c["cell_type"] == "code" for o in c["outputs"]]
    return set(numbers("\n".join(texts)))


def test_there_are_results():
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_result_says_how_it_was_made(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["command"].startswith("python ") and result["hardware"]
    if result.get("method") or "train" in result["command"]:
        assert result["data"] and result["steps"] > 0 and result["weights"] > 0 and len(result["curve"]) > 10
        assert (RESULTS / f"{path.stem}.png").stat().st_size > 1000, "a run has a picture"
    for row in result.get("distances", []):
        assert {"n", "split", "sampler", "network_calls", "features", "seconds"} <= set(row)
        assert any(k.startswith("frechet_") and k.endswith("_floor") for k in row), "no distance without its floor"
    assert not re.search(r"/(root|home|tmp|Users)/", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("chapter", sorted((ROOT / "chapters").glob("*.md")), ids=lambda p: p.stem)
def test_chapters_refer_to_results_that_exist(chapter):
    names = re.findall(
        r"results/([\w-]+\.(?:json|png))|RESULTS / \"([\w-]+\.\w+)\"", chapter.read_text(encoding="utf-8")
    )
    for name in (a or b for a, b in names):
        assert (RESULTS / name).exists(), name


def test_prose_on_runs_has_no_number_of_its_own():
    text = CHAPTER.read_text(encoding="utf-8")
    found = prose(text, SECTIONS)
    assert len(found) > 1500, "the sections have other names now: change SECTIONS"
    results = [x for path in FILES for x in leaves(json.loads(path.read_text(encoding="utf-8")))]
    assert strays(found, results, printed_by(CHAPTER.with_suffix(".ipynb"))) == []


def test_a_stray_number_is_seen():
    """The test above can fail: a number that nobody measured is found, one that was measured is not."""
    text = """
## Other
Here 12345.6 is no concern.

## Real runs
The distance is 17.42, at 1,800 steps; the loss fell to 0.035. In $x=3.7$ and `--lr 99` nothing is claimed.

```python
print(55.5)
```

## Next
And 77.7 is outside.
"""
    found = prose(text, ("Real runs",))
    assert numbers(found) == ["17.42", "1800", "0.035"]
    assert strays(found, [1800.0, 0.03461], set()) == ["17.42"]
    assert strays(found, [17.4249, 1800.0, 0.03461], set()) == []
    assert strays(found, [1800.0, 0.0361], {"17.42"}) == ["0.035"]


def test_a_run_on_a_folder_is_measured_and_kept(tmp_path, monkeypatch):
    """Snapshots name no path, so the tool must: run, distances along the training, pictures, curve."""
    for split in ("train", "test"):
        for k, gray in enumerate(torch.randint(0, 256, (24, 32, 32), dtype=torch.uint8)):
            (tmp_path / split).mkdir(exist_ok=True)
            Image.fromarray(gray.numpy()).convert("RGB").save(tmp_path / split / f"{k}.png")
    run, words = tmp_path / "run", ["--width", "4", "--batch", "4", "--T", "20", "--groups", "2", "--device", "cpu"]
    more = ["--steps", "10", "--warmup", "2", "--log-every", "1", "--snapshots", "2", "--lr", "0.001"]
    assert main(["train", "ddpm", "--data", f"folder:{tmp_path}", "--out", str(run), *words, *more]) == 0
    monkeypatch.setattr(keep, "PLACE", tmp_path / "kept")
    what = ["--hardware", "a processor", "--data", "noise", "--n", "8", "--rows", "ddim:2", "ddim:3", "--bits", "2"]
    what += ["--along", "6"]
    monkeypatch.setattr(sys, "argv", ["results.py", "run", str(run), "name", *what])
    keep.main()
    result = json.loads((tmp_path / "kept" / "name.json").read_text())
    assert result["command"].endswith("--groups 2 --T 20") and str(tmp_path) not in json.dumps(result)
    assert [d["network_calls"] for d in result["distances"]] == [2, 3]
    assert [(d["step"], d["n"]) for d in result["training"]] == [(5, 6), (10, 6)]
    assert 0 < result["training"][0]["trained_seconds"] <= result["training"][1]["trained_seconds"]
    assert all(d["frechet_cifar"] > d["frechet_cifar_floor"] > 0 for d in result["distances"] + result["training"])
    assert result["bits"]["bits_n"] == 2 and len(result["curve"]) == 10
    monkeypatch.setattr(sys, "argv", ["results.py", "large", str(run), "name", "--n", "16", "--row", "ddim:2"])
    keep.main()
    more = json.loads((tmp_path / "kept" / "name.json").read_text())
    assert more["large"]["n"] == 16 and more["large"]["network_calls"] == 2
    assert more == result | {"large": more["large"]}
    (tmp_path / "kept" / "name.json").write_text(json.dumps(more | {"command": more["command"] + " --seed 1"}))
    with pytest.raises(SystemExit, match="tells of another run"):
        keep.main()
    assert all((tmp_path / "kept" / f"name{end}.png").stat().st_size > 1000 for end in ("", "_training"))


def test_a_run_with_two_ends_is_complete_at_the_first(monkeypatch):
    info = {"train": asdict(TrainConfig(steps=100, minutes=1.0)), "step": 40, "seconds": 60.0}
    monkeypatch.setattr(keep.checkpoint, "read", lambda path, with_tensors: (None, info))
    assert keep.complete("run") is info
    info["seconds"] = 59.0
    with pytest.raises(SystemExit, match="run is not complete"):
        keep.complete("run")


class Started:
    """Stands for the commands that tools/runs.py starts: keeps what was said, and lets those with ``bad`` fail."""

    def __init__(self, monkeypatch, path, *options, bad=None):
        self.said, self.ended, self.bad = [], [], bad
        monkeypatch.setattr(all_runs, "start", self)
        what = ["--data", "digits", "--words", "digits", "--hardware", "none", "--tag", "x"]
        what += ["--methods", "ddpm", "ncsn"]
        monkeypatch.setattr(sys, "argv", ["runs.py", str(path), *what, *options])

    def __call__(self, *words):
        number = len(self.said)
        self.said.append([*map(str, words)])

        def wait():
            self.ended.append(number)
            return int(self.bad in words)

        return SimpleNamespace(wait=wait)

    def verbs(self):
        return [words[2 if words[0] == "-m" else 1] for words in self.said]


def test_the_script_of_all_runs_passes_words_on(tmp_path, monkeypatch):
    started = Started(monkeypatch, tmp_path, "--", "--steps", "10")
    all_runs.main()
    assert started.verbs() == ["train", "run", "curve", "export"] * 2
    assert started.said[0][-2:] == ["--steps", "10"] and started.said[1][0] == "tools/results.py"


def test_all_may_be_trained_together(tmp_path, monkeypatch):
    started = Started(monkeypatch, tmp_path, "--together")
    all_runs.main()
    assert started.verbs() == ["train"] * 2 + ["run", "curve", "export"] * 2
    assert started.ended == [*range(8)], "a command was not waited for"


@pytest.mark.parametrize("together", [[], ["--together"]])
def test_a_method_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, together):
    started = Started(monkeypatch, tmp_path, *together, bad="ddpm")
    with pytest.raises(SystemExit, match="failed, see above: ddpm$"):
        all_runs.main()
    assert [words[3] for words in started.said if words[2] == "train"] == ["ddpm", "ncsn"]
    assert started.verbs()[-3:] == ["run", "curve", "export"] and started.verbs().count("export") == 1
