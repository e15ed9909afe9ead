from collections import Counter
from pathlib import Path

import pytest

from experiments.lab.corpus import SHARES, TOKENS_PER_DOCUMENT, pretraining_documents
from moe.errors import UserError


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A stand-in for the standard library: two modules and a few topics of prose."""
    (tmp_path / "pydoc_data").mkdir()
    topics = {f"topic{i}": "\n".join(f"Line {i} {j} of prose." for j in range(300)) for i in (2, 1)}
    (tmp_path / "pydoc_data" / "topics.py").write_text(
        f"# comment\ntopics = {topics!r}\n", encoding="utf-8"
    )
    for name in ("b", "a"):
        code = "\n".join(f"{name}_{i} = {i}" for i in range(2000))
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    return tmp_path


def test_every_domain_has_its_share_of_documents_and_no_other_is_there(library: Path) -> None:
    corpus = pretraining_documents(0, 1000, library=library)
    counts = Counter(document.domain for document in corpus.documents)
    assert sum(counts.values()) == 1000
    assert set(counts) == set(SHARES)
    tokens = {domain: count * TOKENS_PER_DOCUMENT[domain] for domain, count in counts.items()}
    for domain, share in SHARES.items():
        assert tokens[domain] / sum(tokens.values()) == pytest.approx(share, abs=0.01)
    assert corpus.notes == ()
    assert corpus.python_version.count(".") == 2


def test_shares_sum_to_one() -> None:
    assert sum(SHARES.values()) == pytest.approx(1)
    assert set(SHARES) == set(TOKENS_PER_DOCUMENT)


def test_the_same_seed_gives_the_same_corpus_and_another_seed_another(library: Path) -> None:
    first = pretraining_documents(4, 200, library=library)
    assert first == pretraining_documents(4, 200, library=library)
    assert first != pretraining_documents(5, 200, library=library)


def test_no_held_out_document_is_in_training(library: Path) -> None:
    train = pretraining_documents(0, 1500, library=library)
    held_out = pretraining_documents(1, 500, library=library, split="held_out")
    texts = {document.text for document in train.documents}
    assert not texts & {document.text for document in held_out.documents}
    assert {document.domain for document in held_out.documents} == set(SHARES)


def test_documents_are_shuffled_over_domains(library: Path) -> None:
    corpus = pretraining_documents(0, 200, library=library)
    assert len({document.domain for document in corpus.documents[:40]}) >= 5


def test_an_absent_library_is_said_in_a_sentence_each_and_the_rest_goes_on(tmp_path: Path) -> None:
    corpus = pretraining_documents(0, 100, library=tmp_path)
    assert len(corpus.documents) == 100
    assert {document.domain for document in corpus.documents} == set(SHARES) - {"pydoc", "python"}
    prose, source = corpus.notes
    assert prose.startswith("The domain pydoc was left out") and "topics.py" in prose
    assert source.startswith("The domain python was left out") and "*.py sources" in source


def test_library_pieces_are_short_ascii_runs_of_whole_lines(library: Path) -> None:
    (library / "c.py").write_text("# caf\u00e9 " + "x" * 400 + "\n", encoding="utf-8")
    corpus = pretraining_documents(0, 300, library=library, shares={"python": 1.0})
    texts = [(library / f"{name}.py").read_text(encoding="utf-8") for name in "ab"]
    lines = {line for text in texts for line in text.split("\n")}
    for document in corpus.documents:
        assert document.text.isascii() and 250 < len(document.text) < 400
        assert set(document.text.split("\n")) <= lines


def test_a_domain_without_a_share_is_neither_read_nor_noted(tmp_path: Path) -> None:
    corpus = pretraining_documents(0, 10, library=tmp_path, shares={"lists": 1.0, "python": 0.0})
    assert corpus.notes == ()
    assert {document.domain for document in corpus.documents} == {"lists"}


def test_the_running_interpreter_has_prose_and_source_or_says_that_it_has_not() -> None:
    corpus = pretraining_documents(0, 300)
    domains = {document.domain for document in corpus.documents}
    assert len(set(SHARES) - domains) == len(corpus.notes)


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no domain is called tales_moon"):
        pretraining_documents(0, 10, shares={"tales_moon": 1.0})
    with pytest.raises(UserError, match="num_documents is 0"):
        pretraining_documents(0, 0)
    with pytest.raises(UserError, match="one above zero"):
        pretraining_documents(0, 10, shares={"lists": 0.0})
    with pytest.raises(UserError, match="would be empty: The domain python was left out"):
        pretraining_documents(0, 10, library=tmp_path, shares={"python": 1.0})
