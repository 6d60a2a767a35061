import pytest

from puma_jax.data.mbeir import Candidate, Query, content_key
from puma_jax.errors import DataError


def test_equal_contents_have_equal_keys_however_their_texts_are_spelled():
    key = content_key("A red bicycle.", "a.jpg")
    for text in (' "a red bicycle" ', "A red bicycle", "a red bicycle.\r\n"):
        assert content_key(text, "a.jpg") == key
    others = [("A red bicycle!", "a.jpg"), ("A red bicycle.", "b.jpg"), ("A red bicycle.", None)]
    others += [(None, "a.jpg"), ("a.jpg", "A red bicycle.")]
    assert len({key, *(content_key(*other) for other in others)}) == 1 + len(others)
    # A key is stored with built data: it may never change.
    assert content_key("a red bicycle", None) == 9972497888531789808


@pytest.mark.parametrize("text", ['""', ' " ', '"\r"', '" "'])
def test_a_text_of_quotes_alone_is_refused_by_every_reader(text):
    with pytest.raises(DataError, match=r"^txt is .*, which leaves no text"):
        Candidate("9:1", text, None, "text")
    with pytest.raises(DataError, match=r"^query_txt is .*, which leaves no text"):
        Query("9:1", text, None, "text", ("9:1",), 0)
    Candidate("9:1", text, "a.jpg", "image,text")
