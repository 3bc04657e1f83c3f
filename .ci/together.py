"""For the site: what is read in one piece is not broken over two lines."""

import re
from typing import Any

# A figure's interval in a table, as in `46.3 (40–53)`.
_INTERVAL = re.compile(r"(?<=\d )\(\d[\d.,]*–\d[\d.,]*\)(?=</td>)")
# Short code in a text, such as a flag, which browsers would break behind its dashes.
_CODE = re.compile(r"<code>(?=(?:<[^>]+>)*[^<\n]{1,18}(?:<[^>]+>)*</code>)")


def on_page_content(html: str, **_: Any) -> str:
    """Mark it for the style sheet."""
    html = _CODE.sub('<code class="short">', html)
    return _INTERVAL.sub(r'<span class="interval">\g<0></span>', html)
