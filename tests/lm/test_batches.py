import itertools
import logging
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from sonde.data.python_docs import topics
from sonde.data.text import documents
from sonde.errors import SondeError
from sonde.lm.batches import TokenBatches, rank_and_world
from sonde.organisms.small_lm import END_OF_TEXT, train_tokenizer

END = 0  # id of the end-of-text token


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(topics()[:20], 400)


@pytest.fixture(scope="module")
def bare(tokenizer):
    """The same vocabulary without special tokens."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)


@pytest.fixture(scope="module")
def opening():
    """A tokenizer that opens each text with a token, as those of Llama and Gemma do."""
    made = train_tokenizer(topics()[:20], 400)
    made.add_special_tokens({"bos_token": "<s>"})
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
    )
    return made


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).filter(lambda text: text.strip())
given_texts = st.lists(words, min_size=1, max_size=8)
english = st.lists(st.sampled_from([text[:400] for text in topics()]), min_size=1, max_size=12)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def rows_of(batches):
    return [row[mask].tolist() for batch in batches for row, mask in zip(batch.tokens, batch.mask, strict=True)]


def flat(rows):
    return list(itertools.chain.from_iterable(rows))


def same(one, other):
    return all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("tokens", "mask", "documents", "chunks", "n_bytes")
    )


@settings(max_examples=20, deadline=None)
@given(english, st.integers(2, 50), st.integers(1, 5))
def test_joined_rows_are_the_text_cut_with_only_the_ragged_tail_lost(tokenizer, texts, context, rows):
    whole = [i for text in texts for i in [END, *ids_of(tokenizer, text)]]
    batches = TokenBatches(texts, tokenizer, context=context, rows=rows)
    found = rows_of(batches)
    assert flat(found) == whole[: len(whole) // context * context]
    assert {len(row) for row in found} == {context}
    assert all(batch.mask.all() and len(batch.tokens) <= rows for batch in batches)


@settings(max_examples=20, deadline=None)
@given(given_texts, st.integers(2, 50))
def test_apart_every_document_is_there_once_and_pads_stand_at_the_end(tokenizer, texts, context):
    batches = TokenBatches(texts, tokenizer, context=context, tokens_per_batch=100, join=False)
    rows = {}
    for batch in batches:
        for chunk, document, tokens, mask in zip(batch.chunks, batch.documents, batch.tokens, batch.mask, strict=True):
            rows[int(chunk)] = (int(document), tokens[mask].tolist())
    pieces: dict[int, list[int]] = {}
    for _, (document, row) in sorted(rows.items()):
        assert row[0] == END
        pieces.setdefault(document, []).extend(row[1:])
    assert [pieces[i] for i in range(len(texts))] == [ids_of(tokenizer, text) for text in texts]
    for batch in batches:
        assert not (batch.mask[:, 1:] & ~batch.mask[:, :-1]).any()
        assert batch.tokens.numel() <= max(100, context)


def test_rows_of_like_length_share_a_batch(tokenizer):
    texts = [text[: 20 + 37 * i % 900] for i, text in enumerate(topics() * 4)]
    batches = TokenBatches(texts, tokenizer, context=512, tokens_per_batch=2048, join=False)
    real = sum(int(batch.mask.sum()) for batch in batches)
    assert real / sum(batch.mask.numel() for batch in batches) > 0.95


@settings(max_examples=20, deadline=None)
@given(given_texts)
def test_the_scored_bytes_of_whole_documents_are_those_of_the_text(tokenizer, texts):
    batches = TokenBatches(texts, tokenizer, context=600, join=False)
    sizes = {int(d): int(n) for batch in batches for d, n in zip(batch.documents, batch.n_bytes, strict=True)}
    assert sizes == {i: len(text.encode()) for i, text in enumerate(texts)}
    assert batches.n_bytes == sum(sizes.values())


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(st.characters(codec="ascii"), min_size=30), min_size=1), st.integers(2, 12), st.booleans())
def test_the_scored_bytes_of_any_row_are_those_of_the_decoded_scored_tokens(tokenizer, texts, context, join):
    texts = [text + "!" for text in texts]
    batches = TokenBatches(texts, tokenizer, context=context, join=join)
    for batch in batches:
        decoded = [
            tokenizer.decode(row[scored], skip_special_tokens=True)
            for row, scored in zip(batch.tokens, batch.scored, strict=True)
        ]
        assert batch.n_bytes.tolist() == [len(text.encode()) for text in decoded]
    assert batches.n_bytes == sum(int(batch.n_bytes.sum()) for batch in batches)
    assert batches.n_tokens == sum(int(batch.scored.sum()) for batch in batches)


@pytest.mark.parametrize(
    "layout", [{}, {"join": False}, {"shuffle": True, "seed": 3}, {"join": False, "shuffle": True}]
)
def test_a_batch_is_a_function_of_its_number(tokenizer, layout):
    made = [
        TokenBatches(None, tokenizer, context=32, tokens_per_batch=512, limit_tokens=6000, **layout) for _ in range(2)
    ]
    whole = list(made[0])
    assert made[0].hash == made[1].hash
    assert [batch.index for batch in whole] == list(range(len(whole)))
    for start in (0, 1, len(whole) // 2, len(whole), len(whole) + 3):
        rest = list(made[1].from_(start))
        assert len(rest) == max(0, len(whole) - start)
        assert all(same(one, other) for one, other in zip(rest, whole[start:], strict=True))
    assert same(made[1][2], whole[2])
    with pytest.raises(IndexError, match="does not exist"):
        made[0][len(whole)]


@pytest.mark.parametrize("world", [2, 3, 7])
@pytest.mark.parametrize("start", [0, 4])
def test_ranks_share_the_batches_without_gap_or_overlap(tokenizer, world, start):
    alone = TokenBatches(None, tokenizer, context=32, rows=4, limit_tokens=2500)
    shares = [
        TokenBatches(None, tokenizer, context=32, rows=4, limit_tokens=2500, rank=rank, world=world)
        for rank in range(world)
    ]
    assert {share.hash for share in shares} == {alone.hash}
    assert sum(len(share) for share in shares) == len(alone) == alone.n_batches
    found = sorted(batch.index for share in shares for batch in share.from_(start))
    assert found == list(range(start, len(alone)))
    for share in shares:
        assert all(batch.index % world == share.rank and same(batch, alone[batch.index]) for batch in share)


def test_torchrun_decides_the_share(tokenizer, monkeypatch):
    assert rank_and_world() == (0, 1)
    monkeypatch.setitem(os.environ, "RANK", "1")
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    assert rank_and_world() == (1, 2)
    batches = TokenBatches(None, tokenizer, context=32, rows=4, limit_tokens=2500)
    assert next(iter(batches)).index == 1


@pytest.mark.parametrize("join", [True, False])
@pytest.mark.parametrize("fraction", [0.1, 0.25, 1 / 3, 0.5, 0.9])
def test_a_split_is_disjoint_complete_and_holds_out_the_end_of_the_text(tokenizer, join, fraction):
    batches = TokenBatches(None, tokenizer, context=64, limit_tokens=12_800, join=join, shuffle=True)
    rest, held = batches.split(fraction)
    chunks = [torch.cat([batch.chunks for batch in part]).tolist() for part in (rest, held)]
    assert sorted(chunks[0] + chunks[1]) == list(range(batches.n_chunks))
    assert len(chunks[1]) == int(batches.n_chunks * fraction + 1e-9)
    assert max(chunks[0]) < min(chunks[1])
    assert rest.n_tokens + held.n_tokens == batches.n_tokens
    assert rest.n_bytes + held.n_bytes == batches.n_bytes
    assert len({part.hash for part in (batches, rest, held)}) == 3
    by_chunk = {
        int(c): row[mask].tolist() for b in batches for c, row, mask in zip(b.chunks, b.tokens, b.mask, strict=True)
    }
    for part in (rest, held):
        for b in part:
            for c, row, mask in zip(b.chunks, b.tokens, b.mask, strict=True):
                assert row[mask].tolist() == by_chunk[int(c)]


def test_shuffling_moves_rows_and_changes_none(tokenizer):
    plain, one, two = (
        TokenBatches(None, tokenizer, context=64, limit_tokens=6000, **order)
        for order in ({}, {"shuffle": True}, {"shuffle": True, "seed": 1})
    )
    assert rows_of(plain) != rows_of(one) != rows_of(two)
    assert sorted(rows_of(plain)) == sorted(rows_of(one)) == sorted(rows_of(two))


def test_documents_of_rows_are_those_in_which_they_begin(tokenizer):
    texts = ["first " * 30, "second " * 30]
    batches = TokenBatches(texts, tokenizer, context=8)
    second = 1 + len(ids_of(tokenizer, texts[0]))
    for batch in batches:
        assert batch.documents.tolist() == [int(8 * chunk >= second) for chunk in batch.chunks.tolist()]


def test_a_limit_leaves_the_rest_of_a_stream_unread(tokenizer):
    taken = itertools.count()
    endless = (f"Document {next(taken)} says something. " * 20 for _ in itertools.repeat(None))
    batches = TokenBatches(endless, tokenizer, context=64, limit_tokens=6400)
    assert batches.n_chunks == 100
    assert next(taken) < 200
    for limit in (64, 127, 128, 1000):
        assert TokenBatches(None, tokenizer, context=64, limit_tokens=limit).n_chunks == limit // 64


def test_a_long_document_has_the_same_tokens_in_pieces(tokenizer, monkeypatch):
    text = "\n\n".join(topics()[:8])
    whole = TokenBatches([text], tokenizer, context=64)
    monkeypatch.setattr("sonde.lm.batches._PIECE", 2000)
    monkeypatch.setattr("sonde.lm.batches._BLOCK", 5000)
    pieces = TokenBatches([text], tokenizer, context=64)
    assert rows_of(pieces) == rows_of(whole)
    assert pieces.n_bytes == whole.n_bytes
    assert TokenBatches(["日" * 1000], tokenizer, context=64).n_tokens  # no space to cut at


def test_a_tokenizer_without_special_tokens_joins_documents_without(bare):
    texts = ["one two three", "four five six"]
    found = rows_of(TokenBatches(texts, bare, context=2))
    whole = [i for text in texts for i in ids_of(bare, text)]
    assert flat(found) == whole[: len(whole) // 2 * 2]
    apart = TokenBatches(texts, bare, context=64, join=False)
    assert rows_of(apart) == [ids_of(bare, text) for text in texts]
    assert apart.n_tokens == len(whole) - 2


@pytest.mark.parametrize("join", [True, False])
def test_where_the_tokenizer_opens_texts_every_row_is_opened_and_every_token_of_the_text_scored(opening, join):
    texts = [text[:500] for text in topics()[:6]]
    batches = TokenBatches(texts, opening, context=32, join=join)
    rows = rows_of(batches)
    assert all(row[0] == opening.bos_token_id and opening.bos_token_id not in row[1:] for row in rows)
    assert batches.n_tokens == sum(len(row) - 1 for row in rows)
    if join:
        between = opening.eos_token_id
        whole = [i for text in texts for i in [between, *ids_of(opening, text)]][1:]
        assert flat(row[1:] for row in rows) == whole[: len(whole) // 31 * 31]
    else:
        assert batches.n_bytes == sum(len(text.encode()) for text in texts)


def test_a_tokenizer_that_does_not_say_where_tokens_are_shares_the_bytes_evenly():
    class Characters(PreTrainedTokenizer):
        vocab_size = 128

        def get_vocab(self):
            return {chr(i): i for i in range(128)}

        def _tokenize(self, text, **kwargs):
            return [c if ord(c) < 128 else "?" for c in text]

        def _convert_token_to_id(self, token):
            return ord(token)

        def _convert_id_to_token(self, index):
            return chr(index)

    batches = TokenBatches(["plain words", "schöne Wörter"], Characters(), context=64, join=False)
    assert batches.n_tokens == 11 + 13 - 2
    assert batches.n_bytes == 11 + 15 - 2


def test_long_documents_raise_no_warning_and_leave_the_tokenizer_as_it_was(caplog):
    made = train_tokenizer(topics()[:5], 300)
    made.model_max_length = 16
    before = dict(made.deprecation_warnings)
    with caplog.at_level(logging.WARNING):
        TokenBatches(topics()[:5], made, context=64)
    assert not caplog.records
    assert (made.deprecation_warnings, made.model_max_length) == (before, 16)


def test_the_end_of_text_written_in_a_document_does_no_harm(tokenizer):
    batches = TokenBatches([f"one{END_OF_TEXT}two"], tokenizer, context=64, join=False)
    assert batches.n_bytes == len(f"one{END_OF_TEXT}two")


def test_the_hash_tells_texts_and_layouts_apart(tokenizer):
    layouts = [{}, {"context": 16}, {"join": False}, {"shuffle": True}, {"rows": 3}, {"limit_tokens": 640}]
    hashes = {TokenBatches(topics()[:9], tokenizer, **({"context": 32} | layout)).hash for layout in layouts}
    hashes.add(TokenBatches(topics()[1:9], tokenizer, context=32).hash)
    assert len(hashes) == len(layouts) + 1


def test_batches_describe_themselves(tokenizer):
    assert str(TokenBatches(None, tokenizer, context=64, limit_tokens=6400)) == "6,400 tokens of pydoc topics"
    assert str(TokenBatches(["a few words"], tokenizer, context=64, join=False)).endswith(" tokens of 1 given text")


def test_batch_size_counts_pads_and_a_row_longer_than_it_stands_alone(tokenizer):
    assert {
        len(batch.tokens) for batch in TokenBatches(None, tokenizer, context=64, tokens_per_batch=10, limit_tokens=300)
    } == {1}
    assert TokenBatches(None, tokenizer, context=64, tokens_per_batch=200, limit_tokens=300)[0].tokens.shape == (3, 64)


def test_text_shorter_than_a_chunk_says_how_many_tokens_there_are(tokenizer):
    with pytest.raises(
        SondeError, match=r"^1 given text: \d+ tokens of text, fewer than one chunk of 512: give more text"
    ):
        TokenBatches(["a few words"], tokenizer, context=512)
    with pytest.raises(SondeError, match="no text"):
        TokenBatches([], tokenizer, context=512)


def test_one_token_alone_has_nothing_to_predict(bare):
    with pytest.raises(SondeError, match="no document has two tokens"):
        TokenBatches(["a"], bare, context=8, join=False)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"context": 1}, "context is 1; it must be at least 2"),
        ({"rows": 0}, "rows is 0"),
        ({"tokens_per_batch": 0}, "tokens_per_batch is 0"),
        ({"limit_tokens": 0}, "limit_tokens is 0"),
        ({"rank": 2, "world": 2}, "rank 2 does not exist among 2"),
    ],
)
def test_settings_out_of_range_are_refused(tokenizer, wrong, message):
    with pytest.raises(SondeError, match=message):
        TokenBatches(None, tokenizer, **({"context": 64} | wrong))


def test_a_split_that_leaves_nothing_is_refused(tokenizer):
    batches = TokenBatches(None, tokenizer, context=64, limit_tokens=256)
    for fraction, message in ((0.0, "between 0 and 1"), (1.0, "between 0 and 1"), (0.1, "make 4 rows")):
        with pytest.raises(SondeError, match=message):
            batches.split(fraction)
    with pytest.raises(SondeError, match="no batch -1"):
        batches.from_(-1)


@pytest.mark.data
def test_bits_per_byte_of_a_uniform_model_do_not_depend_on_the_context(tokenizer, shared_data):
    # every scored token costs log2 V bits, so the rate per byte is that of the whole text whatever the rows
    text = shared_data / "text" / "wikitext2_valid.txt"
    size = len("".join(documents(text, limit_chars=100_000)).encode())
    count = len(ids_of(tokenizer, "".join(documents(text, limit_chars=100_000))))
    for context in (16, 64, 512):
        batches = TokenBatches(documents(text, limit_chars=100_000), tokenizer, context=context)
        assert batches.n_tokens / batches.n_bytes == pytest.approx(count / size, rel=0.01)
