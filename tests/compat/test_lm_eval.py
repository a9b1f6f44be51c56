"""What the project uses of lm-evaluation-harness beside its public interface still does what it is used for."""

import os
from types import SimpleNamespace

import pytest

from trainer.evaluation.harness import compat

pytest.importorskip("lm_eval")

TASK = """
task: compat_sums
tag: compat_tag
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
process_docs: !function code.never_called
generation_kwargs: {{until: ["\\n"]}}
metric_list: [{{metric: exact_match}}]
"""


def written_task(directory, *, function=True):
    rows = directory / "rows.jsonl"
    rows.write_text('{"question": "1+1=", "answer": "2"}\n')
    (directory / "code.py").write_text("raise SystemExit('code of a task was run')\n")
    text = TASK.format(rows=rows)
    if not function:
        text = "".join(line for line in text.splitlines(keepends=True) if "!function" not in line)
    file = directory / "sums.yaml"
    file.write_text(text)
    return file


def test_lm_eval_task_file_is_read_without_running_its_code_and_its_tag_grows(tmp_path):
    file = written_task(tmp_path)
    (tmp_path / "group.yaml").write_text("group: compat_group\ntask: [compat_sums]\ninclude: base.yaml\n")
    (tmp_path / "base.yaml").write_text("aggregate_metric_list: [{metric: exact_match, weight_by_size: false}]\n")
    index = {}
    compat.read_task_file(file, index)
    compat.read_task_file(tmp_path / "group.yaml", index)
    other = tmp_path / "other.yaml"
    other.write_text(file.read_text().replace("compat_sums", "compat_more"))
    compat.read_task_file(other, index)
    kinds = {name: entry.kind.name for name, entry in index.items()}
    assert kinds == {"compat_sums": "TASK", "compat_more": "TASK", "compat_tag": "TAG", "compat_group": "GROUP"}
    assert index["compat_tag"].tags == {"compat_sums", "compat_more"}
    assert index["compat_sums"].cfg["process_docs"] == str(tmp_path / "code.never_called")
    assert index["compat_group"].cfg["aggregate_metric_list"][0]["weight_by_size"] is False
    (tmp_path / "broken.yaml").write_text("task: [")
    with pytest.raises(Exception, match="broken"):
        compat.read_task_file(tmp_path / "broken.yaml", {})


def test_lm_eval_task_has_the_filters_under_which_its_metrics_are_kept(tmp_path):
    from lm_eval.tasks import TaskManager

    file = written_task(tmp_path, function=False)
    filters = "filter_list: [{name: strict, filter: [{function: take_first}]}, {name: lax, filter: [{function: take_first}]}]\n"
    (tmp_path / "filtered.yaml").write_text(file.read_text().replace("compat_sums", "compat_filtered") + filters)
    manager = TaskManager(include_path=tmp_path, include_defaults=False)
    with compat.without_network():
        tasks = manager.load(["compat_sums", "compat_filtered"])["tasks"]
    assert compat.filter_names(tasks["compat_sums"]) == ["none"]
    assert compat.filter_names(tasks["compat_filtered"]) == ["strict", "lax"]


def test_lm_eval_lengths_prefixes_and_generation_are_those_of_the_hf_model():
    tokenizer = SimpleNamespace(model_max_length=77)
    assert compat.longest_context(SimpleNamespace(max_position_embeddings=128), tokenizer) == 128
    assert compat.longest_context(SimpleNamespace(), tokenizer) == 77
    assert compat.begins_with_prefix("<s>once", "<s>") and not compat.begins_with_prefix("once", "<s>")
    settings = compat.normalized_generation_kwargs({"until": "\n", "max_new_tokens": 5})
    assert (settings["until"], settings["max_gen_toks"], settings["do_sample"]) == (["\n"], 5, False)
    assert compat.normalized_generation_kwargs({}, 9)["max_gen_toks"] == 9


def test_lm_eval_draws_no_progress_bar_over_rows(tmp_path, capsys):
    from lm_eval.api import task

    def drawn():
        assert list(task.tqdm(iter(range(3)), disable=False)) == [0, 1, 2]
        return capsys.readouterr().err

    assert drawn()
    with compat.without_progress_bars():
        assert not drawn()
    assert drawn()


def test_lm_eval_offline_refuses_before_it_opens_a_connection(monkeypatch):
    """The libraries refuse before they open a connection."""
    import datasets
    import evaluate
    import huggingface_hub

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection was opened"))
    with compat.without_network():
        assert huggingface_hub.is_offline_mode()
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        with pytest.raises(huggingface_hub.errors.OfflineModeIsEnabled):
            huggingface_hub.HfApi().model_info("nobody/nothing")
        with pytest.raises(Exception, match=r"(?i)offline|cache|find"):
            datasets.load_dataset("nobody/nothing")
        with pytest.raises(Exception, match=r"(?i)offline|cache|find|module"):
            evaluate.load("nobody_nothing")
    assert not huggingface_hub.is_offline_mode()
