"""Pictures for a report, as data: URLs, and the perturbations of a run as a file."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from markupsafe import Markup
from PIL import Image

from ibau_jax.perturbations import Pixel
from ibau_jax.unlearning import Round
from ibau_jax.unlearning.state import that_found

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THEMES = {"light": ("#1b1f24", "#d0d7de"), "dark": ("#e6edf3", "#3d444d")}  # text and lines, grid
CURVES = {
    "acc": ("ACC", "#2f81f7", "-"),
    "asr": ("ASR", "#d1242f", "-"),
    "ra": ("RA", "#2da44e", "-"),
}


def picture(image: Float[np.ndarray, "h w c"]) -> Markup:
    """An image in [0, 1] as a PNG."""
    pixels = np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0]).save(stream, "PNG")
    return _url(stream.getvalue(), "image/png")


def curves(before: dict[str, Any], records: Sequence[dict[str, Any]]) -> dict[str, Markup]:
    """Draws the figures round by round, by theme.

    Args:
        before: figures of the original model (round 0).
        records: the rounds as result.json has them.
    """
    rows = [{name: record[name] for name in CURVES} for record in (before, *records)]
    return {theme: _url(_drawn(rows, *colours), "image/svg+xml") for theme, colours in THEMES.items()}


def _drawn(rows: list[dict[str, float | None]], ink: str, grid: str) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for name, (label, colour, style) in CURVES.items():
        values = [row[name] for row in rows]
        if any(value is not None for value in values):
            shares = [np.nan if value is None else 100 * value for value in values]
            axis.plot(shares, f"{style}o", color=colour, label=label)
    axis.set(xlabel="round", ylabel="%", ylim=(-3, 103), xticks=range(len(rows)))
    axis.grid(color=grid, linewidth=0.6)
    _tinted(axis, ink, grid)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, labelcolor=ink)
    return _svg(figure)


def _tinted(axis: Any, ink: str, grid: str) -> None:
    axis.patch.set_alpha(0)
    axis.tick_params(colors=ink)
    for label in (axis.xaxis.label, axis.yaxis.label):
        label.set_color(ink)
    for name, spine in axis.spines.items():
        spine.set_color(grid)
        spine.set_visible(name in ("left", "bottom"))


def _svg(figure: "Figure") -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", transparent=True)
    return stream.getvalue()


def _url(content: bytes, kind: str) -> Markup:
    return Markup(f"data:{kind};base64,{base64.b64encode(content).decode()}")


def plot_perturbations(rounds: Sequence[Round], file: Path) -> None:
    """Draws every δ, a row a round that found some; grey is 0, and the largest value is black or white."""
    from matplotlib.figure import Figure

    rounds = that_found(rounds)
    columns = max(len(done.perturbation) for done in rounds)
    figure = Figure(figsize=(2.4 * columns, 3.05 * len(rounds)), layout="constrained")
    axes = figure.subplots(len(rounds), columns, squeeze=False)
    for axis in axes.ravel():
        axis.axis("off")
    for row, done in zip(axes, rounds, strict=True):
        for axis, delta in zip(row, done.perturbation, strict=False):
            image = Pixel().to_image(delta, delta.shape)
            axis.imshow(image if image.shape[2] == 3 else image[:, :, 0], cmap="gray", vmin=0, vmax=1)
            norm, largest = np.linalg.norm(delta), np.abs(delta).max()
            axis.set_title(f"round {done.number}\n‖δ‖ = {norm:.3g}\nmax |δ| = {largest:.3g}", fontsize=9)
    figure.savefig(file, dpi=150)
