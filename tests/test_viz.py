"""Pictures: grids, the frame player's HTML, and the live lab."""

from __future__ import annotations

from html.parser import HTMLParser

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pytest
import torch

from minigen import viz


def frame(k: int) -> bytes:
    fig, ax = plt.subplots(figsize=(1, 1))
    ax.plot([0, k])
    return viz.fig_to_frame(fig, dpi=30)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_player_has_alt_text_labels_and_controls():
    player = viz.FramePlayer([frame(k) for k in range(3)], ["a", "b <&>", "c"], alt='a "line" rises', start=-1)
    tags = Tags()
    tags.feed(player._repr_html_())
    images = [a for t, a in tags.found if t == "img"]
    assert [a["alt"] for a in images] == ['a "line" rises (a)', 'a "line" rises (b <&>)', 'a "line" rises (c)']
    assert [("block" in a["style"]) for a in images] == [False, False, True]
    slider = next(a for t, a in tags.found if t == "input")
    assert (slider["min"], slider["max"], slider["value"]) == ("0", "2", "2") and slider["aria-label"]
    assert not any("http" in str(a.get("src", "")) for _, a in tags.found) and not any("id" in a for _, a in tags.found)
    assert player._repr_html_() == player._repr_html_()


def test_player_refuses_missing_labels():
    with pytest.raises(ValueError, match="one label per frame"):
        viz.FramePlayer([frame(0)], [], alt="x")


def test_image_grid_places_every_image():
    x = torch.linspace(-1, 1, 5)[:, None, None, None].expand(5, 1, 2, 2)
    grid = viz.image_grid(x, columns=3)
    assert grid.shape == (5, 8, 3)
    assert grid[0, 0, 0] == 0 and grid[0, 3, 0] == 64 and grid[3, 3, 0] == 255 and grid[2, 0, 0] == 255


def test_live_lab_redraws():
    widgets = pytest.importorskip("ipywidgets")
    seen = []

    def draw(k):
        seen.append(k)
        fig, _ = plt.subplots(figsize=(1, 1))
        return fig

    box = viz.live(draw, k=widgets.IntSlider(value=1, max=5))
    box.children[0].value = 4
    assert seen == [1, 4] and box.children[1].value[8:12] == b"WEBP"
