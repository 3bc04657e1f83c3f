"""For the site: a figure's interval, as in `46.3 (40–53)`, is not broken over two lines."""

import re
from typing import Any

_INTERVAL = re.compile(r"(?<=\d )\(\d[\d.,]*–\d[\d.,]*\)(?=</td>)")


def on_page_content(html: str, **_: Any) -> str:
    """Keep the intervals of a page's tables together."""
    return _INTERVAL.sub(r'<span class="interval">\g<0></span>', html)
