"""Without the extra `serve`, the command says what to install."""

from __future__ import annotations

import pytest

from peft_moe_delta.cli import main, served


def test_serve_without_its_extra_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(served.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "adapter"])
    assert stopped.value.code == 1
    assert "serve needs fastapi and uvicorn" in (said := capsys.readouterr().err) and "peft-moe-delta[serve]" in said


@pytest.mark.parametrize("option", ["--max-tokens", "--queue", "--batch-size"])
def test_limits_are_whole_numbers_from_one_on(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "adapter", option, "0"])
    assert stopped.value.code == 2 and "at least 1, got '0'" in capsys.readouterr().err
