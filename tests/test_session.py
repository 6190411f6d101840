"""Session: what is opened once and read many times."""

import shutil

from attention_guided_rl.randomness import Purpose


def test_a_corpus_is_opened_once_and_each_stream_begins_at_its_beginning(make_session, corpus_file, tmp_path):
    path = shutil.copy(corpus_file, tmp_path / "articles.jsonl")
    session = make_session({"corpus.path": str(path)})
    first = session.stream(session.config.corpus, num_probes=0, purpose=Purpose.POOL)
    path.unlink()  # opening it again would fail
    second = session.stream(session.config.corpus, num_probes=0, purpose=Purpose.POOL)

    pools = [stream.next_pool(1).pair_ids for stream in (first, second, first, second)]
    assert pools[0] == pools[1] != pools[2] == pools[3]
