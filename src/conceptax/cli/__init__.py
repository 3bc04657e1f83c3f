"""The `conceptax` command."""


def main() -> int:
    """Run the command line and return its exit status."""
    print("conceptax: no command is installed yet")
    return 0
