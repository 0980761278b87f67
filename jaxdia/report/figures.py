"""Pictures of the report, mostly as data URIs that need no other file."""

import base64
import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import Float, Integer
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from jaxdia.attacks import CATALOGUE
from jaxdia.report.sweeps import Sweep
from jaxdia.report.tradeoff import METRIC, Point
from jaxdia.report.words import attack_label, metric

# Okabe and Ito's colours, but for yellow, which cannot be seen on white.
_COLOURS = ("#0072B2", "#E69F00", "#000000", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#7F7F7F")
_MARKERS = "osD^vP*X"
_DASHES = ("-", "--", "-.", ":")
_STYLE = {
  "axes.grid": True,
  "axes.spines.right": False,
  "axes.spines.top": False,
  "font.size": 10,
  "grid.alpha": 0.3,
  "legend.fontsize": 8,
  "legend.frameon": False,
}
# Larger images are shown scaled down to this many pixels a side, and saved as JPEG.
_MAX_SIDE = 96
_GIF_SIDE = 128
_MAX_FRAMES = 36
_FRAME_MILLISECONDS = 150
_LAST_FRAME_MILLISECONDS = 2500


def success_curves(name: str, rates: dict[str, tuple[Sequence[float], Sequence[float]]]) -> str:
  """Draws the share of images that are at least as similar as a threshold.

  Args:
    name: of the metric.
    rates: by attack, thresholds and the share of images that reach each.

  Returns:
    A PNG as data URI.
  """
  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=(4.2, 3.2), layout="constrained")
    axis = figure.subplots()
    for attack, (thresholds, rate) in rates.items():
      marker = _style(attack)["marker"]
      style = _style(attack) | {"marker": marker if len(thresholds) < 25 else None}
      axis.plot(thresholds, rate, label=_plain(attack_label(attack)), **style)
    bound = "least" if metric(name).larger_is_better else "most"
    axis.set(
      xlabel=f"{metric(name).title}: at {bound}", ylabel="share of images", ylim=(-0.03, 1.03)
    )
    return png_uri(_png(figure))


def sweep_curves(sweep: Sweep, name: str) -> bytes:
  """Draws the median of a metric over a setting, with a band from worst to best image.

  Args:
    sweep: with points of the metric.
    name: of the metric; what is written with an exponent is drawn so.

  Returns:
    A PNG.
  """
  combinations = list(dict.fromkeys(line.rest for line in sweep.lines))
  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=(4.2, 3.4), layout="constrained")
    axis = figure.subplots()
    for line in sweep.lines:
      low, median, high = line.points[name].T
      style = _style(line.attack)
      style["linestyle"] = _DASHES[combinations.index(line.rest) % len(_DASHES)]
      label = _plain(", ".join(filter(None, (attack_label(line.attack), line.rest))))
      axis.plot(line.x, median, label=label, **style)
      axis.fill_between(line.x, low, high, color=style["color"], alpha=0.12, linewidth=0)
    _scale_x(axis, sorted({x for line in sweep.lines for x in line.x}))
    if metric(name).format.endswith("e}"):
      axis.set_yscale("log", nonpositive="clip")
    axis.set(xlabel=_plain(sweep.setting), ylabel=f"{metric(name).title} (median)")
    return _png(figure)


def tradeoff(points: Sequence[Point]) -> bytes:
  """Draws accuracy against leakage, and names the ways to train that no other beats in both.

  Args:
    points: of `find_tradeoff`.

  Returns:
    A PNG.
  """
  best = [point for point in points if point.best]
  with matplotlib.rc_context(_STYLE):
    size = (6.4, 3.4 + 0.16 * len(best))
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    beaten = [(p.accuracy, p.leakage) for p in points if not p.best]
    if beaten:
      axis.scatter(*zip(*beaten, strict=True), color=_COLOURS[-1], s=16)
    front = [p.accuracy for p in best], [p.leakage for p in best]
    axis.plot(*front, drawstyle="steps-pre", color=_COLOURS[0], linewidth=1.2, zorder=1)
    for number, point in enumerate(best, 1):
      at = (point.accuracy, point.leakage)
      axis.scatter(*at, s=24, color=_COLOURS[0], label=_plain(f"{number}  {point.settings}"))
      axis.annotate(str(number), at, (4, 4), textcoords="offset points", fontsize=8)
    axis.set(
      xlabel=f"{metric('accuracy').title} after the training",
      ylabel=f"{metric(METRIC).title} of the best attack (median)",
    )
    return _png(figure)


def _scale_x(axis, values) -> None:
  positive = [x for x in values if x > 0]
  if values[0] < 0 or not positive or positive[-1] < 30 * positive[0]:
    return
  if values[0] > 0:
    axis.set_xscale("log")
  else:  # zero has its place beside powers of ten
    axis.set_xscale("symlog", linthresh=positive[0])


def site_bars(accuracy: dict[str, dict[str, float]]) -> str:
  """Draws how much of each dropout site's mask was found.

  Args:
    accuracy: by attack and site, from 0 to 1.

  Returns:
    A PNG as data URI.
  """
  sites = list(dict.fromkeys(site for values in accuracy.values() for site in values))
  height = 0.8 / len(accuracy)
  with matplotlib.rc_context(_STYLE):
    size = (4.2, 1.2 + 0.22 * len(sites) * (1 + len(accuracy) / 2))
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    for i, (attack, values) in enumerate(accuracy.items()):
      at = [sites.index(site) + (i - (len(accuracy) - 1) / 2) * height for site in values]
      colour = _style(attack)["color"]
      label = _plain(attack_label(attack))
      axis.barh(at, list(values.values()), height, color=colour, label=label)
    axis.set_yticks(range(len(sites)), [_plain(site) for site in sites])
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set(xlabel="share of the mask that is right", xlim=(0, 1))
    return png_uri(_png(figure))


def image_uri(image: Float[np.ndarray, "height width channels"]) -> str | None:
  """Returns an image as data URI, or None where there is none.

  Args:
    image: f[H, W, C], pixels in [0, 1]; NaN where there is none.
  """
  if not np.isfinite(image).all():
    return None
  picture = _picture(np.round(np.clip(image, 0, 1) * 255).astype(np.uint8))
  if max(picture.size) <= _MAX_SIDE:
    return _uri(picture, "png")
  picture.thumbnail((_MAX_SIDE, _MAX_SIDE))
  return _uri(picture, "jpeg", quality=88)


def formation(
  originals: Float[np.ndarray, "images height width channels"],
  frames: Integer[np.ndarray, "images frames height width channels"],
  iterations: Integer[np.ndarray, " frames"],
) -> tuple[str, str]:
  """Shows reconstructions as they form, each beside its original.

  Args:
    originals: f[M, H, W, C], pixels in [0, 1].
    frames: u8[M, K, H, W, C], the reconstructions over time.
    iterations: i[K], when.

  Returns:
    A GIF as data URI, and its last frame as PNG.
  """
  chosen = np.unique(np.linspace(0, len(iterations) - 1, _MAX_FRAMES).round().astype(int))
  originals = np.round(np.clip(originals, 0, 1) * 255).astype(np.uint8)
  pictures = [_frame(originals, frames[:, k], int(iterations[k])) for k in chosen]
  durations = [_FRAME_MILLISECONDS] * (len(pictures) - 1) + [_LAST_FRAME_MILLISECONDS]
  gif = _uri(
    pictures[0], "gif", save_all=True, append_images=pictures[1:], duration=durations, loop=0
  )
  return gif, _uri(pictures[-1], "png")


def _frame(originals, reconstructions, iteration) -> Image.Image:
  gap, header = 6, 20
  scale = min(1.0, _GIF_SIDE / max(originals.shape[1:3]))
  if scale == 1.0:  # whole pixels stay sharp
    scale = max(1, round(_GIF_SIDE / max(originals.shape[1:3])))
  height, width = (round(side * scale) for side in originals.shape[1:3])
  width_of_all = 2 * max(width, 110) + 3 * gap
  picture = Image.new(
    "RGB" if originals.shape[-1] == 3 else "L",
    (width_of_all, header + len(originals) * (height + gap)),
    "white",
  )
  draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
  second = width_of_all // 2 + gap // 2
  draw.text((gap, 3), "original", "black", font)
  draw.text((second, 3), f"iteration {iteration:,}", "black", font)
  how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
  for row, pair in enumerate(zip(originals, reconstructions, strict=True)):
    for left, image in zip((gap, second), pair, strict=True):
      scaled = _picture(image).resize((width, height), how)
      picture.paste(scaled, (left, header + row * (height + gap)))
  return picture


def _picture(image) -> Image.Image:
  """Returns u8[H, W, C] as a picture; of other channels than three, the first is shown."""
  return Image.fromarray(image if image.shape[-1] == 3 else image[..., 0])


def _style(attack):
  """Returns how an attack is drawn, the same in all figures."""
  names = list(CATALOGUE)
  number = names.index(attack) if attack in names else len(names)
  return {
    "color": _COLOURS[number % len(_COLOURS)],
    "marker": _MARKERS[(number + number // len(_COLOURS)) % len(_MARKERS)],
    "markersize": 4,
    "linewidth": 1.6,
  }


def _plain(text) -> str:
  """Returns a text in which matplotlib sees no formula, shortened for a legend."""
  text = text if len(text) <= 60 else text[:57] + "..."
  return text.replace("$", r"\$")


def png_uri(png: bytes) -> str:
  """Returns a PNG as data URI."""
  return _encode(png, "png")


def _png(figure) -> bytes:
  """Returns a finished figure, with its legend below, and closes it."""
  handles, labels = figure.axes[0].get_legend_handles_labels()
  columns = 1 if max(map(len, labels)) > 24 else 3
  figure.legend(handles, labels, loc="outside lower center", ncols=columns)
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", dpi=150)
  return buffer.getvalue()


def _uri(picture, kind, **options) -> str:
  buffer = io.BytesIO()
  picture.save(buffer, kind, **options)
  return _encode(buffer.getvalue(), kind)


def _encode(data, kind) -> str:
  return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
