"""Records are replaced whole, whoever writes them at the same time."""

from concurrent.futures import ThreadPoolExecutor

from trainer.records.status import write_text_atomic


def test_threads_of_a_process_may_write_one_file_at_once(tmp_path):
    path, texts = tmp_path / "energy" / "host.json", [str(number) * 1000 for number in range(4)]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(50):
            list(threads.map(lambda text: write_text_atomic(path, text), texts))
            assert path.read_text() in texts
    assert [found.name for found in path.parent.iterdir()] == [path.name]
