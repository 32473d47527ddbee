import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tipdistill.vocabulary import (
    check_ids_shared,
    check_same_tokenizer,
    check_served_tokenizer,
    described_differences,
    forbidden_ids,
    known_tokens,
    shared_vocabulary,
    token_bytes,
)


def words(*tokens, splitter=None):
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    tokenizer.pre_tokenizer = splitter or pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=tokens[0])


def test_the_same_tokenizer_passes():
    check_same_tokenizer(words("<unk>", "a", "b"), words("<unk>", "a", "b"))


def test_the_first_differing_token_is_named():
    with pytest.raises(ValueError, match=r"first at token id 1: the student reads 'a' and the teacher reads 'c'"):
        check_same_tokenizer(words("<unk>", "a", "b", "x"), words("<unk>", "c", "b", "y"))


def test_a_token_that_only_one_has_is_named():
    with pytest.raises(ValueError, match=r"token id 2: the student has no such token and the teacher reads 'b'"):
        check_same_tokenizer(words("<unk>", "a"), words("<unk>", "a", "b"))


def test_the_same_vocabulary_split_differently_is_found():
    plain, digits = pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)
    tokens = ("<unk>", "00123", "1", "2", "0")
    with pytest.raises(ValueError, match="split text differently"):
        check_same_tokenizer(words(*tokens, splitter=plain), words(*tokens, splitter=digits))


def test_padding_rows_are_shared_and_real_tokens_are_not_dropped():
    assert shared_vocabulary(151_936, 152_064, num_tokens=151_665) == 151_936
    with pytest.raises(ValueError, match="the teacher's lm_head has only 90 rows"):
        shared_vocabulary(100, 90, num_tokens=95)


# What each token stands for.


def metaspace_tokenizer():
    """SentencePiece's way of writing: ▁ for a space, <0x..> for bytes that are no token."""
    tokens = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁▁", "é"]
    tokenizer = Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(tokens)},
            [("▁", "a"), ("▁", "▁")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


@given(st.text())
@settings(max_examples=60, deadline=None)
def test_text_is_rebuilt_exactly(tiny_tokenizer, text):
    for tokenizer in (tiny_tokenizer, metaspace_tokenizer()):
        pieces = token_bytes(tokenizer)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(pieces[index] for index in ids).decode() == text.encode("utf-8", "replace").decode()


def test_a_blank_that_the_tokenizer_puts_between_words_belongs_to_the_word_behind_it():
    words = {"[UNK]": 0, "play": 1, "##ing": 2, "all": 3, "day": 4}
    pieced = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    pieced.decoder = decoders.WordPiece(cleanup=False)
    listed = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    for backend in (pieced, listed):
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
        tokenizer.add_tokens([AddedToken("<call>", special=False, normalized=False)])
        ids = tokenizer("play <call> all [UNK] day" if backend is listed else "playing <call> all [UNK] day")[
            "input_ids"
        ]
        pieces = token_bytes(tokenizer)
        assert b"".join(pieces[index] for index in ids).decode() == " " + tokenizer.decode(ids)
    assert pieces[words["play"]] == b" play"


# Reserved tokens.


def reserving(base, *tokens):
    tokenizer = copy.deepcopy(base)
    tokenizer.add_tokens([AddedToken(token, special=token.startswith("<|"), normalized=False) for token in tokens])
    return tokenizer


def test_added_and_renamed_reserved_tokens_are_named_by_id(tiny_tokenizer):
    first = len(tiny_tokenizer)
    student = reserving(tiny_tokenizer, "<|reserved_0|>", "<|reserved_1|>")
    teacher = reserving(tiny_tokenizer, "<|reserved_0|>", "<think>", "</think>")
    assert check_same_tokenizer(student, student) == {}
    differing = check_same_tokenizer(student, teacher)
    assert differing == {first + 1: ("<|reserved_1|>", "<think>"), first + 2: (None, "</think>")}
    assert described_differences(differing).startswith(
        f"the tokenizers differ in 2 reserved tokens: {first + 1} (the student's '<|reserved_1|>', the teacher's "
        f"'<think>'), {first + 2} (the student's none, the teacher's '</think>'). "
    )
    many = described_differences(dict.fromkeys(range(9), ("a", None)))
    assert "4 (the student's 'a', the teacher's none) and 4 more." in many


def test_the_same_token_at_another_id_is_a_difference_at_both(tiny_tokenizer):
    first = len(tiny_tokenizer)
    differing = check_same_tokenizer(reserving(tiny_tokenizer, "<a>", "<b>"), reserving(tiny_tokenizer, "<b>", "<a>"))
    assert differing == {first: ("<a>", "<b>"), first + 1: ("<b>", "<a>")}


def marked(*tokens):
    """BPE without merges of a single character: a longer token of its vocabulary is never given by a text."""
    vocabulary = {token: index for index, token in enumerate([*" abcdefghijklmnopqrstuvwxyz<>[]0123456789", *tokens])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=[])))


def test_a_marker_of_the_vocabulary_that_no_text_gives_is_reserved():
    first = len(marked())
    assert check_same_tokenizer(marked("<unused0>", "[x]"), marked("<unused1>", "[y]")) == {
        first: ("<unused0>", "<unused1>"),
        first + 1: ("[x]", "[y]"),
    }
    with pytest.raises(ValueError, match="the student reads 'word' and the teacher reads 'other'"):
        check_same_tokenizer(marked("word"), marked("other"))
    with pytest.raises(ValueError, match="the student reads '<unused0>' and the teacher reads 'other'"):
        check_same_tokenizer(marked("<unused0>"), marked("other"))
    with pytest.raises(ValueError, match="'<0x0A>' and the teacher reads '<0x0B>'"):  # a byte, which texts do give
        check_same_tokenizer(marked("<0x0A>"), marked("<0x0B>"))


def test_a_server_may_have_other_added_tokens(tiny_tokenizer):
    def tokenize_of(tokenizer):
        return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]

    first = len(tiny_tokenizer)
    student = reserving(tiny_tokenizer, "<|a|>", "<think>", "<|c|>")
    teacher = reserving(tiny_tokenizer, "<|a|>", "<|b|>", "<|c|>", "<|d|>")
    assert check_served_tokenizer(student, tokenize_of(student)) == {}
    assert check_served_tokenizer(student, tokenize_of(teacher)) == {first + 1: ("<think>", None)}
    assert check_served_tokenizer(student, tokenize_of(tiny_tokenizer)).keys() == {first, first + 1, first + 2}
    with pytest.raises(ValueError, match="the teacher's server reads text as other tokens"):
        check_served_tokenizer(student, lambda text: tokenize_of(student)(text)[::-1])


def test_what_may_not_be_sampled_and_what_needs_a_row(tiny_tokenizer):
    size = len(tiny_tokenizer)
    student = reserving(tiny_tokenizer, "<a>")
    differing = check_same_tokenizer(student, tiny_tokenizer)
    # a teacher without a row for the added token
    assert shared_vocabulary(size + 4, size, num_tokens=known_tokens(student, differing)) == size
    assert forbidden_ids(size + 2, size, differing) == [size, size + 1]
    assert forbidden_ids(size, size + 8, {size - 1: ("x", "y"), size + 1: (None, "z")}) == [size - 1]
    assert known_tokens(student, {}) == size + 1


def test_prompts_with_such_a_token_are_refused_by_row():
    differing = {5: ("<a>", "<b>")}
    check_ids_shared([[1, 2], [3]], differing)
    with pytest.raises(
        ValueError, match=r"of row 11 \(counting from 0\) of the set holds token 5, and the student reads"
    ):
        check_ids_shared([[1, 2], [4, 5]], differing, "the set", 10)
    with pytest.raises(ValueError, match="prompt 1 of the batch holds token 5"):
        check_ids_shared([[1, 2], [4, 5]], differing)
