"""The text embedder: which texts it sends, what it makes of the answers, and when it distrusts them."""

import hashlib

import numpy as np
import pytest
import torch
from torch import Tensor

from attention_guided_rl.config import NetworkConfig
from attention_guided_rl.embedders.cache import VectorStore
from attention_guided_rl.embedders.text import CANARIES, STORE, TextEmbedder, check_canaries
from attention_guided_rl.environment import Embedder
from attention_guided_rl.errors import CheckpointError, RemoteError
from attention_guided_rl.network import Network

PIECES = ["<pad>", "ant", " bee", " ", "\n", " seal", " ant"]
PAD, ANT, BEE, SPACE, NEWLINE, SEAL, ANT_INSIDE = range(7)
SIZE = 8


class Words:
    """An encoder that notes what it is asked; a text's vector depends on its hash, and a little on the moment."""

    def __init__(self, *, batch: int = 100, query_prompt: str = "", key_prompt: str = "", model: int = 0) -> None:
        self.identity, self.query_prompt, self.key_prompt = "words", query_prompt, key_prompt
        self.batch, self.model = batch, model
        self.asked: list[list[str]] = []
        self.noise = 0.0
        self.cut: int | None = None
        self.size = SIZE
        self.fails_at: int | None = None

    def vector(self, text: str) -> np.ndarray:
        digest = hashlib.sha256(f"{self.model} {text[: self.cut]}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest)).standard_normal(self.size)

    def batches(self, texts):
        return [texts[i : i + self.batch] for i in range(0, len(texts), self.batch)]

    def encode(self, texts):
        if self.fails_at is not None and len(self.asked) == self.fails_at:
            raise RemoteError("gone")
        self.asked.append(list(texts))
        vectors = np.stack([self.vector(text) for text in texts])
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors += self.noise * np.random.default_rng(len(self.asked)).standard_normal(vectors.shape)
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    def expected(self, text: str) -> list[float]:
        vector = self.vector(text)
        return (vector / np.linalg.norm(vector)).tolist()


@pytest.fixture
def network(tmp_path) -> Network:
    return Network(NetworkConfig(cache=tmp_path / "cache"))


def store_of(network: Network) -> VectorStore:
    return VectorStore(network.cache(STORE))


def decode(ids: list[int]) -> str:
    return "".join(PIECES[i] for i in ids)


def make(encoder: Words, network: Network) -> TextEmbedder:
    """Return the embedder after a first start."""
    check_canaries(encoder, store_of(network))
    encoder.asked.clear()
    return TextEmbedder(encoder, network, decode)


def tokens(*rows: list[int]) -> tuple[Tensor, Tensor]:
    """Ids padded with ants, which would show if they were read, and the mask."""
    length = max(map(len, rows))
    ids = [row + [ANT] * (length - len(row)) for row in rows]
    mask = [[i < len(row) for i in range(length)] for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


# ---- texts and vectors ----


def test_rows_get_the_vectors_of_their_texts_and_repeats_are_sent_once(network):
    encoder = Words()
    embedder = make(encoder, network)
    vectors = embedder.embed_queries(*tokens([ANT], [ANT, BEE], [ANT], [SEAL], [ANT, BEE]))
    assert encoder.asked == [["ant", "ant bee", " seal"]]
    assert vectors.shape == (5, 1, SIZE)
    expected = [encoder.expected(text) for text in ("ant", "ant bee", "ant", " seal", "ant bee")]
    assert vectors[:, 0].tolist() == [pytest.approx(row, abs=1e-6) for row in expected]


def test_a_second_look_sends_nothing_and_gives_the_same_bits(network):
    encoder = Words()
    encoder.noise = 0.01  # another answer each time
    embedder = make(encoder, network)
    first = embedder.embed_keys(*tokens([ANT], [BEE]))
    second = embedder.embed_keys(*tokens([BEE], [SEAL], [ANT]))
    assert encoder.asked == [["ant", " bee"], [" seal"]]
    assert torch.equal(second[[2, 0]], first)
    again = TextEmbedder(encoder, network, decode).embed_keys(*tokens([ANT], [BEE]))
    assert torch.equal(again, first)
    assert len(encoder.asked) == 2


def test_whitespace_gives_the_zero_vector_and_is_never_sent(network):
    encoder = Words(query_prompt="query: ")
    embedder = make(encoder, network)
    vectors = embedder.embed_queries(*tokens([SPACE, NEWLINE], [ANT], []))
    assert encoder.asked == [["query: ant"]]
    assert vectors[0].tolist() == vectors[2].tolist() == [[0.0] * SIZE]
    assert embedder.embed_queries(*tokens([SPACE], [NEWLINE, SPACE])).tolist() == [[[0.0] * SIZE]] * 2
    assert len(encoder.asked) == 1


def test_what_the_mask_leaves_out_is_not_read(network):
    encoder = Words()
    embedder = make(encoder, network)
    ids, mask = torch.tensor([[PAD, ANT, PAD, BEE], [SEAL, ANT, ANT, ANT]]), torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0]])
    embedder.embed_keys(ids, mask.bool())
    assert encoder.asked == [["ant bee", " seal"]]


def test_queries_and_keys_have_their_own_prompts(network):
    encoder = Words(query_prompt="query: ", key_prompt="passage: ")
    embedder = make(encoder, network)
    queries, keys = embedder.embed_queries(*tokens([ANT])), embedder.embed_keys(*tokens([ANT]))
    assert encoder.asked == [["query: ant"], ["passage: ant"]]
    assert queries[0, 0].tolist() == pytest.approx(encoder.expected("query: ant"), abs=1e-6)
    assert keys[0, 0].tolist() == pytest.approx(encoder.expected("passage: ant"), abs=1e-6)
    other = make(Words(query_prompt="find: "), network)
    assert not torch.equal(other.embed_queries(*tokens([ANT])), queries)  # a changed prompt is another text


def test_a_space_makes_another_text(network):
    encoder = Words()
    make(encoder, network).embed_keys(*tokens([ANT], [ANT_INSIDE], [ANT, SPACE]))
    assert encoder.asked == [["ant", " ant", "ant "]]


def test_what_came_before_a_failure_is_kept_and_the_rest_is_free_for_others(network):
    encoder = Words(batch=2)
    embedder = make(encoder, network)
    encoder.fails_at = 1
    rows = tokens([ANT], [BEE], [SEAL], [ANT, BEE])
    with pytest.raises(RemoteError, match="gone"):
        embedder.embed_keys(*rows)
    other = Words(batch=2)
    vectors = TextEmbedder(other, network, decode).embed_keys(*rows)  # at once, although the claims last 20 minutes
    assert other.asked == [[" seal", "ant bee"]]
    assert vectors[3, 0].tolist() == pytest.approx(encoder.expected("ant bee"), abs=1e-6)


def test_it_is_an_embedder(network):
    embedder = make(Words(), network)
    assert isinstance(embedder, Embedder)
    assert embedder.identity == "words"
    assert embedder.depends_on_policy is False


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_vectors_are_where_the_ids_are(network):
    ids, mask = tokens([ANT], [SPACE])
    assert make(Words(), network).embed_keys(ids.cuda(), mask.cuda()).device.type == "cuda"


# ---- canaries ----


def test_an_encoder_that_never_answered_is_refused(network):
    with pytest.raises(RemoteError, match="has not answered yet") as caught:
        TextEmbedder(Words(), network, decode)
    assert caught.value.exit_code == 5


def test_the_canaries_are_asked_afresh_and_kept_as_they_came_first(network):
    encoder, store = Words(), store_of(network)
    encoder.noise = 1e-3
    check_canaries(encoder, store)
    kept = store.get("words/canaries", CANARIES)
    check_canaries(encoder, store)
    assert encoder.asked == [list(CANARIES)] * 2
    again = store.get("words/canaries", CANARIES)
    assert all(again[text].tobytes() == kept[text].tobytes() for text in CANARIES)
    assert store.get("words", CANARIES) == {}  # a text like a canary is a text


def test_the_canaries_are_asked_in_batches_that_the_encoder_takes(network):
    encoder = Words(batch=3)
    check_canaries(encoder, store_of(network))
    assert list(map(len, encoder.asked)) == [3, 3, 2]


def test_another_model_behind_the_same_name_is_noticed(network):
    store = store_of(network)
    check_canaries(Words(), store)
    with pytest.raises(CheckpointError, match="has changed") as caught:
        check_canaries(Words(model=1), store)
    assert caught.value.exit_code == 7
    check_canaries(Words(), store)  # the first vectors are still those that count


def test_a_small_change_of_the_model_is_noticed(network):
    store, changed = store_of(network), Words()
    check_canaries(Words(), store)
    changed.noise = 0.03  # cosine about 1 / sqrt(1 + 8 · 0.03²) = 0.9964
    with pytest.raises(CheckpointError):
        check_canaries(changed, store)


def test_another_number_of_dimensions_is_noticed(network):
    store, wider = store_of(network), Words()
    check_canaries(Words(), store)
    wider.size = 16
    with pytest.raises(CheckpointError):
        check_canaries(wider, store)


@pytest.mark.parametrize("noise", [0.0, 0.001])
def test_a_service_that_cuts_its_input_short_is_noticed(network, noise):
    """Services answer the same text a little differently each time, so equal texts need not have equal vectors."""
    encoder = Words()
    encoder.cut, encoder.noise = 400, noise
    with pytest.raises(RemoteError, match="differ at the end") as caught:
        check_canaries(encoder, store_of(network))
    assert caught.value.exit_code == 5
    with pytest.raises(RemoteError, match="has not answered yet"):
        TextEmbedder(encoder, network, decode)


def test_vectors_that_are_not_finite_are_never_stored(network):
    encoder = Words()
    encoder.vector = lambda text: np.full(SIZE, np.nan)
    with pytest.raises((CheckpointError, RemoteError)):
        check_canaries(encoder, store_of(network))
    assert store_of(network).get("words/canaries", CANARIES) == {}
