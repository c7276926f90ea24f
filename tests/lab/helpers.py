"""What several tests of lab/ need."""

import pytest


def fails_with(capsys, main, argv, *fragments):
    """The script ends with exit code 2 and one line that holds all fragments."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert stop.value.code == 2 and len(errors) == 1, lines
    assert all(fragment in errors[0] for fragment in fragments), errors
