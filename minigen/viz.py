"""Figures of the book: one palette, pictures of points and images, a player that needs no kernel, live labs.

This module knows only tensors. Three colors mean the same everywhere: ``DATA`` is truth, ``MODEL`` is what was learned
or sampled, ``NOISE`` is noise. They stay apart for color-blind readers and in print.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import ipywidgets
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DATA, MODEL, NOISE = "#0072B2", "#D55E00", "#7F7F7F"
ACCENT = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Further colors (Okabe and Ito), for curves that are neither data nor model nor noise."""

STYLE: dict[str, Any] = {
    "figure.dpi": 130,
    "savefig.dpi": 130,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.grid": False,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "image.cmap": "gray",
    "image.interpolation": "nearest",
    "axes.prop_cycle": plt.cycler(color=[DATA, MODEL, ACCENT[0], ACCENT[1], ACCENT[2], NOISE]),
}


def use_style() -> None:
    """Set Matplotlib's defaults to the look of the book."""
    plt.rcParams.update(STYLE)


def points(ax: Axes, x: Tensor, color: str = DATA, title: str = "", limit: float = 2.6, size: float = 2.0) -> None:
    """Scatter ``x`` (``n 2``) in a square without ticks, both axes from ``-limit`` to ``limit``."""
    x = x.detach().cpu()
    ax.scatter(x[:, 0], x[:, 1], s=size, color=color, alpha=0.5, linewidths=0, rasterized=True)
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[], title=title)
    for side in ax.spines.values():
        side.set(visible=True, color="#CCCCCC")


def image_grid(x: Tensor, columns: int | None = None, gap: int = 1, zoom: int = 1) -> np.ndarray:
    """Tile images ``n c h w`` in [-1, 1] to one array ``H W 3`` of uint8, white between them.

    ``zoom`` enlarges each image smoothly (bicubic); tiny images are easier to read so.
    """
    if zoom > 1:
        x = torch.nn.functional.interpolate(x.detach().float().clamp(-1, 1), scale_factor=zoom, mode="bicubic")
    n, c, h, w = x.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    pixels = ((x.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu().expand(n, 3 if c == 1 else c, h, w)
    out = torch.full((rows * (h + gap) - gap, columns * (w + gap) - gap, pixels.shape[1]), 255, dtype=torch.uint8)
    for k, image in enumerate(pixels.permute(0, 2, 3, 1)):
        top, left = k // columns * (h + gap), k % columns * (w + gap)
        out[top : top + h, left : left + w] = image
    return out.numpy()


def images(ax: Axes, x: Tensor, title: str = "", columns: int | None = None, zoom: int | None = None) -> None:
    """Show images ``n c h w`` in [-1, 1] as a grid; by default those below 16 pixels are enlarged smoothly."""
    zoom = zoom or (6 if x.shape[-1] < 16 else 1)
    ax.imshow(image_grid(x, columns, gap=2 if zoom > 1 else 1, zoom=zoom))
    ax.set(xticks=[], yticks=[], title=title)
    for side in ax.spines.values():
        side.set_visible(False)


def quiver(
    ax: Axes, field: Callable[[Tensor], Tensor], limit: float = 2.6, n: int = 17, color: str = "#333333"
) -> None:
    """Arrows of ``field`` (``n 2`` to ``n 2``) on a grid; lengths are compressed so that directions stay visible."""
    g = torch.linspace(-limit * 0.95, limit * 0.95, n)
    at = torch.cartesian_prod(g, g)
    v = field(at).detach().cpu()
    length = v.norm(dim=1, keepdim=True).clamp(min=1e-9)
    v = v / length * length.sqrt()
    ax.quiver(at[:, 0], at[:, 1], v[:, 0], v[:, 1], color=color, width=0.0035, alpha=0.85, pivot="mid")


def fig_to_frame(fig: Figure, dpi: int = 90, quality: int = 82) -> bytes:
    """Render a figure to WebP bytes and close it."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="webp", dpi=dpi, pil_kwargs={"quality": quality, "method": 6})
    plt.close(fig)
    return buffer.getvalue()


_SHOW = (
    "var f=this.closest('figure'),v=+f.querySelector('input').value;"
    "f.querySelectorAll('img').forEach(function(m,i){m.style.display=i==v?'block':'none'});"
    "var t=f.querySelectorAll('img')[v].title;f.querySelector('output').textContent=t;"
    "f.querySelector('input').setAttribute('aria-valuetext',t)"
)
_PLAY = (
    "var b=this,f=b.closest('figure'),r=f.querySelector('input');"
    "function stop(){clearInterval(f._t);f._t=null;b.textContent='\\u25B6';b.setAttribute('aria-label','Play')}"
    "if(f._t){stop()}else{if(+r.value==+r.max)r.value=-1;b.textContent='\\u23F8';b.setAttribute('aria-label','Pause');"
    "f._t=setInterval(function(){if(!f.isConnected||+r.value==+r.max){stop();return}"
    "r.value=+r.value+1;r.oninput()},%d)}"
)


class FramePlayer:
    """A slider and a play button over pictures made beforehand: plain HTML, no kernel, no network, works by keyboard.

    Args:
        frames: encoded images (WebP, PNG or JPEG bytes) of one size.
        labels: one short text per frame, shown beside the slider and read by screen readers.
        alt: what the whole figure shows.
        interval: milliseconds between frames while playing.
        start: the frame shown first, and the only one where scripts are off.

    Raises:
        ValueError: if the numbers of frames and labels differ, or there are none.
    """

    def __init__(
        self, frames: Sequence[bytes], labels: Sequence[str], alt: str, interval: int = 200, start: int = 0
    ) -> None:
        if not frames or len(frames) != len(labels):
            raise ValueError(f"a player needs one label per frame, got {len(frames)} frames and {len(labels)} labels")
        self.frames, self.labels, self.alt = list(frames), [str(s) for s in labels], alt
        self.interval, self.start = interval, start % len(frames)

    def _repr_html_(self) -> str:
        e, alt, first = html.escape, html.escape(self.alt), html.escape(self.labels[self.start])
        pictures = "".join(
            f'<img src="data:{_mime(data)};base64,{base64.b64encode(data).decode()}" title="{e(label)}" '
            f'alt="{alt} ({e(label)})" '
            f'style="max-width:100%;background:#fff;display:{"block" if i == self.start else "none"}">'
            for i, (data, label) in enumerate(zip(self.frames, self.labels, strict=True))
        )
        return (
            '<figure class="mg-player" data-lm-suppress-shortcuts="true" onkeydown="event.stopPropagation()" '
            f'style="margin:0" role="group" aria-label="{alt}">{pictures}'
            '<div style="display:flex;align-items:center;gap:.6em;margin-top:.3em">'
            '<button type="button" aria-label="Play" style="min-width:2.6em" '
            f'onclick="{_PLAY % self.interval}">&#9654;</button>'
            f'<input type="range" min="0" max="{len(self.frames) - 1}" value="{self.start}" step="1" '
            f'autocomplete="off" aria-label="frame" aria-valuetext="{first}" style="flex:1;max-width:24em" '
            f'oninput="{_SHOW}"><output aria-live="off" style="min-width:7em">{first}</output></div></figure>'
        )

    def __repr__(self) -> str:
        return f"FramePlayer({len(self.frames)} frames)"


def _mime(data: bytes) -> str:
    if data[:4] == b"\x89PNG":
        return "image/png"
    return "image/webp" if data[8:12] == b"WEBP" else "image/jpeg"


def live(draw: Callable[..., Figure], **controls: ipywidgets.Widget) -> ipywidgets.VBox:
    """A live lab: the figure of ``draw(**values)`` is drawn anew whenever a control moves (ipywidgets 7 and 8).

    Args:
        draw: returns a Matplotlib figure for keyword values of the controls.
        controls: named ipywidgets with a ``value``.

    Returns:
        A box with the controls above the picture.
    """
    import ipywidgets

    def render() -> bytes:
        return fig_to_frame(draw(**{name: w.value for name, w in controls.items()}), dpi=110)

    picture = ipywidgets.Image(value=render(), format="webp")
    for widget in controls.values():
        widget.observe(lambda _: setattr(picture, "value", render()), "value")
    return ipywidgets.VBox([*controls.values(), picture])
