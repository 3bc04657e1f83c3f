"""The `conceptax` command."""


def main() -> int:
    """Run the command line and return its exit status."""
    raise SystemExit("conceptax: no command is installed yet")
