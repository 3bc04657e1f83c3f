"""For the site: the explorer of neighborhood attention, as `conceptax gna explore` writes it."""

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the page."""
    from conceptax.reporting.gna_explorer import explorer_page

    files.append(File.generated(config, "explorer.html", content=explorer_page()))
    return files
