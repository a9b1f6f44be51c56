"""Where the report of an evaluation goes: a file is refused before anything is written."""

import pytest

from tests.helpers.launching import command_here


@pytest.mark.parametrize(("below", "said"), [("", ": is a file"), ("/report", "/train.jsonl is a file")])
def test_evaluation_refuses_a_file_in_place_of_its_directory(tmp_path, capsys, below, said):
    file = tmp_path / "train.jsonl"
    file.write_text('{"text": "a"}\n')
    words = [f"model.path={tmp_path}", "evaluation.tasks=[loss]", f"to={file}{below}"]
    assert command_here(["evaluate", *words]) == 64
    told = capsys.readouterr().err
    assert f"to={file}{below}: " in told and f"{said}; name a directory" in told
    assert list(tmp_path.iterdir()) == [file]
