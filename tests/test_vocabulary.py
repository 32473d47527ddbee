import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tipdistill.vocabulary import check_same_tokenizer, shared_vocabulary, token_bytes


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


def test_words_that_the_tokenizer_joins_by_its_own_rules_are_decoded_one_by_one():
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=tokenizer))[1] == b"play"
