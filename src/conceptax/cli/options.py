"""Flags that several commands share."""

from pathlib import Path
from typing import Annotated

import tyro

Model = Annotated[
    Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: the bundled model)")
]
OptionalPath = Annotated[
    Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(optional)")
]
OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(optional)")]
