"""`verify-served` against `serve`: each is a check of the other."""

from __future__ import annotations

import json
import shutil

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from peft_moe_delta.cli import main
from peft_moe_delta.program import VERSION
from peft_moe_delta.served.compare import AGREES, CHECKS
from peft_moe_delta.served.prompts import SENTENCES


def test_our_own_server_agrees_check_by_check(dense, dense_server, tmp_path, capsys):
    line = ["verify-served", str(dense), "--url", dense_server.url, "--max-tokens", "6", "--json", str(tmp_path / "r")]
    main(line)
    assert "agrees with" in capsys.readouterr().out
    report = json.loads((tmp_path / "r").read_text(encoding="utf-8"))
    assert report["agrees"] and len(report["findings"]) == len(CHECKS) * len(SENTENCES)
    rest = [finding for finding in report["findings"] if finding["outcome"] != AGREES]
    assert all(finding["detail"] == "no token to compare" for finding in rest), rest  # a text that ends at once


def test_an_adapters_server_agrees_with_what_is_exported_of_a_language(adapter, server, tmp_path, capsys):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(adapter.base), adapter.folder).eval()
    with pytest.warns(UserWarning, match="nothing to graft"):  # so the adapter is what is exported
        model.merge_and_graft(adapter.base, language="el").save_pretrained(tmp_path / "el")
    (tmp_path / "en.jsonl").write_text('{"text": "the cat sat"}\n', encoding="utf-8")
    asked = ["--text", f"en={tmp_path / 'en.jsonl'}", "--max-tokens", "6", "--language"]
    line = ["verify-served", str(tmp_path / "el"), "--url", server.url, *asked]
    main([*line, "el"])
    assert "agrees with" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main([*line, "hu"])
    said = capsys.readouterr()
    assert stopped.value.code == 1 and "does not agree" in said.out and "error:" not in said.err
    assert "prompt log-probabilities, en: differs: the log-probability of" in said.out
    main(["verify-served", str(adapter.folder), "--url", server.url, *asked, "auto"])
    assert "agrees with" in capsys.readouterr().out


def test_agreement_is_recorded_and_nothing_else(dense, dense_server, tmp_path, capsys):
    export = shutil.copytree(dense, tmp_path / "dense")
    line = ["verify-served", str(export), "--url", dense_server.url, "--max-tokens", "2", "--record"]
    (tmp_path / "en.jsonl").write_text('{"text": "the cat sat"}\n', encoding="utf-8")
    line += ["--text", f"en={tmp_path / 'en.jsonl'}"]
    main(line)
    main(line)  # in the place of the first
    assert "recorded in" in capsys.readouterr().out
    [row] = json.loads((export / "served.json").read_text())["verified"]
    assert (row["engine"], row["version"], row["form"]) == ("peft-moe-delta", VERSION, "the export")
    assert row["languages"] == ["en"] and row["difference"] <= row["tolerance"] == 1e-3 and "token ids" in row["checks"]
    with pytest.raises(SystemExit):
        main([*line, "--tolerance=-1"])
    assert json.loads((export / "served.json").read_text())["verified"] == [row]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["verify-served", "org/model", "--url", dense_server.url, "--record"])
    assert stopped.value.code == 3 and "no folder here" in capsys.readouterr().err
