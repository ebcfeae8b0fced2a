import polars as pl

from torchrec_mpe.app.data.dictionary import ValueDictionary


def test_codes_follow_first_appearance_over_batches() -> None:
    dictionary = ValueDictionary()
    assert dictionary.encode(pl.Series(["b", "", "b", "a"])).tolist() == [0, 1, 0, 2]
    assert dictionary.encode(pl.Series([], dtype=pl.String)).tolist() == []
    assert dictionary.encode(pl.Series(["c" * 50, "a", "d", "c" * 50])).tolist() == [3, 2, 4, 3]
    assert dictionary.size == 5
    assert dictionary.take_values().to_list() == ["b", "", "a", "c" * 50, "d"]


def test_dictionaries_are_independent() -> None:
    first, second = ValueDictionary(), ValueDictionary()
    first.encode(pl.Series(["x", "y"]))
    assert second.encode(pl.Series(["y"])).tolist() == [0]
    assert second.take_values().to_list() == ["y"]
