"""Command lines that must be refused."""

import re

import pytest


@pytest.fixture
def refused(capsys):
    """A function that runs a program with arguments that it must refuse; its message, without box and line breaks."""

    def run(main, *arguments):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        return " ".join(re.sub("[╭─╮│╰╯]", " ", capsys.readouterr().err).split())

    return run
