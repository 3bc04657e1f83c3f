"""What the studio's page shows of a job, as HTML: the sentence, how far it is, the pictures."""

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

import conceptax
from conceptax.bundled import ASSETS
from conceptax.reporting.pictures import save_png
from conceptax.studio.jobs import Row, Told

STYLE = ASSETS / "studio" / "studio.css"
_SMALL = 160  # pixels of a side up to which an image is shown in squares, not blurred


def text(words: object) -> str:
    """Text as HTML, in which a template finds nothing to fill in either."""
    escaped = html.escape(str(words))
    for sign in "{}$`\\":
        escaped = escaped.replace(sign, f"&#{ord(sign)};")
    return escaped


def status(told: Told) -> str:
    """The sentence that a job tells, with a bar until it ends."""
    if told.ended:
        return f'<div class="cx-status" role="status">{text(told.said)}</div>'
    percent = f"{100 * told.done:.1f}"
    bar = (
        f'<div class="cx-bar" role="progressbar" aria-label="progress" aria-valuenow="{percent}">'
        f'<div style="width: {percent}%"></div></div>'
    )
    return f'<div class="cx-status" role="status">{bar}<span>{text(told.said)} …</span></div>'


def failure(sentence: str) -> str:
    """What went wrong."""
    return f'<div class="cx-status cx-failed" role="alert">{text(sentence)}</div>'


def pictures(rows: Sequence[Row]) -> str:
    """The pictures, a row each."""
    return f'<div class="cx-rows">{"".join(map(_row, rows))}</div>' if rows else ""


def _row(row: Row) -> str:
    title = f"<h3>{text(row.title)}</h3>" if row.title else ""
    figures = "".join(
        f'<figure><img class="{_kind(picture.image.shape)}" alt="{text(picture.caption)}" '
        f'width="{picture.image.shape[1]}" height="{picture.image.shape[0]}" '
        f'src="data:image/png;base64,{_png(picture.image)}">'
        f"<figcaption>{text(picture.caption)}</figcaption></figure>"
        for picture in row.pictures
    )
    return f'<section class="cx-row">{title}<div class="cx-pictures">{figures}</div></section>'


def _png(image: UInt8[np.ndarray, "H W 3"]) -> str:
    """A PNG file in base64."""
    buffer = io.BytesIO()
    save_png(image, buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def _kind(shape: Sequence[int]) -> str:
    return "cx-small" if max(shape[:2]) <= _SMALL else "cx-large"


def head(source: str) -> str:
    """The head of the page."""
    return (
        f'<header class="cx-head"><h1>conceptax studio</h1><p>{text(source)} · conceptax '
        f"{text(conceptax.__version__)}</p></header>"
    )


def settings_table(rows: Sequence[tuple[str, str, str]]) -> str:
    """Settings: how each is given, what stands for it otherwise, what it does."""
    body = "".join(
        f"<tr><td><code>{text(flag)}</code></td><td>{text(stands)}</td><td>{text(what)}</td></tr>"
        for flag, stands, what in rows
    )
    heads = "".join(f"<th>{each}</th>" for each in ("setting", "default", "what it does"))
    return f'<div class="cx-table"><table><tr>{heads}</tr>{body}</table></div>'


def note(words: str) -> str:
    """A remark."""
    return f'<p class="cx-note">{text(words)}</p>'
