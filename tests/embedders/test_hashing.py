"""The hashing embedder: bags of words of unit length, the same in every process."""

import math

import pytest
import torch
from torch import Tensor

from attention_guided_rl.config import EmbedderConfig, SelectionConfig
from attention_guided_rl.embedders.hashing import HashingEmbedder
from attention_guided_rl.environment import ReadingEnvironment
from attention_guided_rl.model import LanguageModel
from attention_guided_rl.selection import head_scores, selection_logprobs


@pytest.fixture(scope="module")
def model(make_model, byte_tokenizer) -> LanguageModel:
    return make_model("llama", tokenizer=byte_tokenizer(), vocab_size=272)


@pytest.fixture
def embedder(model) -> HashingEmbedder:
    return HashingEmbedder(EmbedderConfig(), model)


def tokens(model: LanguageModel, *texts: str) -> tuple[Tensor, Tensor]:
    """Ids and mask of texts; what the mask leaves out is filled with a letter, to show if it is read."""
    ids = [model.encode(text) for text in texts]
    length = max(map(len, ids))
    (filler,) = model.encode("x")
    padded = [row + [filler] * (length - len(row)) for row in ids]
    mask = [[i < len(row) for i in range(length)] for row in ids]
    return torch.tensor(padded), torch.tensor(mask).view(len(texts), length)


def vectors(embedder: HashingEmbedder, model: LanguageModel, *texts: str) -> Tensor:
    return embedder.embed_queries(*tokens(model, *texts))[:, 0]


def test_a_word_has_the_same_place_in_every_process(embedder, model):
    """`printf WORD | b2sum -l 64` is c8e99ae36bff42c0 for seal, 76b7fd5c41281d8a for ant, 194bb01620ff73fb for bee:
    the last bit is the sign, the rest modulo 4,096 the place."""
    seal, ant, bee = vectors(embedder, model, "seal", "ant", "bee")
    assert {int(i): float(seal[i]) for i in seal.nonzero()} == {352: -1.0}
    assert {int(i): float(ant[i]) for i in ant.nonzero()} == {3781: -1.0}
    assert {int(i): float(bee[i]) for i in bee.nonzero()} == {2557: 1.0}


def test_scores_are_the_cosine_of_word_counts(embedder, model):
    texts = vectors(embedder, model, "ant bee", "bee seal", "ant ant bee", "ant", "seal")
    scores = (texts @ texts.T).tolist()
    assert scores[0][1] == pytest.approx(1 / 2)  # one word of two in common
    assert scores[2][3] == pytest.approx(2 / math.sqrt(5))  # (2, 1) against (1, 0)
    assert scores[0][4] == pytest.approx(0.0)


def test_vectors_have_unit_length(embedder, model):
    lengths = vectors(embedder, model, "ant", "ant ant ant bee", "What the seal of Velor Ashdale keeps:").norm(dim=-1)
    assert lengths.tolist() == pytest.approx([1.0, 1.0, 1.0])


def test_case_order_spaces_and_punctuation_do_not_matter(embedder, model):
    a, b, c = vectors(embedder, model, "The seal, of ANT", " of  the\nant (Seal)", "the seal of ants")
    assert torch.equal(a, b)
    assert not torch.allclose(a, c)


def test_letters_beyond_ascii_are_letters(embedder, model):
    a, b = vectors(embedder, model, "Łódź", "łódź")
    assert torch.equal(a, b)
    assert float(a.norm()) == pytest.approx(1.0)
    assert int((a != 0).sum()) == 1


def test_whitespace_gives_the_zero_vector(embedder, model):
    assert torch.equal(vectors(embedder, model, " \n\t ", "ant")[0], torch.zeros(4096))


def test_whitespace_leaves_the_choice_uniform(embedder, model):
    keys = embedder.embed_keys(*tokens(model, "ant", "bee", "seal"))
    scores = head_scores(embedder.embed_queries(*tokens(model, "  ")), keys[None])
    chances = selection_logprobs(scores, torch.tensor([[True, True, True]]), 0.01).exp()
    assert chances.tolist() == [pytest.approx([1 / 3] * 3)]


def test_padding_is_not_read(embedder, model):
    padded, alone = vectors(embedder, model, "ant", "a much longer text")[0], vectors(embedder, model, "ant")[0]
    assert torch.equal(padded, alone)


def test_an_empty_text_gives_the_zero_vector(embedder):
    nothing = embedder.embed_keys(torch.tensor([[5, 6]]), torch.zeros(1, 2, dtype=torch.bool))
    assert not nothing.any()


def test_queries_and_keys_are_embedded_alike_with_one_head(embedder, model):
    ids, mask = tokens(model, "ant bee", "seal")
    queries, keys = embedder.embed_queries(ids, mask), embedder.embed_keys(ids, mask)
    assert torch.equal(queries, keys)
    assert queries.shape == (2, 1, 4096)


def test_the_number_of_dimensions_is_a_setting_and_part_of_the_identity(model):
    small = HashingEmbedder(EmbedderConfig(dimensions=7), model)
    vector = vectors(small, model, "seal")[0]
    assert {int(i): float(vector[i]) for i in vector.nonzero()} == {2: -1.0}  # 0xc8e99ae36bff42c0 // 2 modulo 7
    assert small.identity != HashingEmbedder(EmbedderConfig(dimensions=8), model).identity
    assert small.depends_on_policy is False


def test_an_environment_accepts_it(embedder):
    assert ReadingEnvironment(embedder, SelectionConfig(), 0.5).temperature == 0.5
