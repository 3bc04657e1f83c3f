"""`conceptax report`: the pages of several runs in one, their methods side by side."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from conceptax.cli.options import shown
from conceptax.cli.runs import new_folder
from conceptax.reporting.gallery import REPORT, Images, compared, read_report, write_report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Show several runs of one kind in one page: what each method did to the same prompts.

    A run is a folder that `conceptax evaluate`, `evaluate personalization`, `segment evaluate` or
    `demo` wrote, or its report.html. Images of one prompt and one noise stand side by side, and
    every table has a column for each run.

    Writes report.html; where its images are many they lie beside it, in report-images/.

    Attributes:
      runs: the folders, in the order to show them.
      output: the folder to write.
      force: replace an earlier comparison.
    """

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], shown("PATH", "")] = ()
    output: Path = Path("comparison")
    force: bool = False


def run(command: Command) -> None:
    """Read the pages and write theirs."""
    names = [str(run) for run in command.runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(twice)} comes twice: pass each run once.")
    with new_folder(command, markers=[REPORT]) as folder:
        images = Images(folder)
        pages = {str(run): read_report(run, images) for run in command.runs}
        write_report(folder, compared(pages), images)
    print(f"{command.output}: {REPORT} of {len(names)} run{'' if len(names) == 1 else 's'}")
