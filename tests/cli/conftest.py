"""The command line in this process."""

import sys

import pytest

from finescale.cli import main as entry


@pytest.fixture
def cli(capsys, monkeypatch):
    """``cli("inspect", folder) -> (exit code, stdout, stderr)``."""
    monkeypatch.setenv("COLUMNS", "220")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["finescale", *map(str, arguments)])
        capsys.readouterr()
        try:
            entry.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
