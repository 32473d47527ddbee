import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tipdistill.vocabulary import check_same_tokenizer, shared_vocabulary


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
