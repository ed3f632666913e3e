"""The shipped captions, and a split that no neighbour can change."""

import pytest

from atomtune.data.prompts import split_held_out, unrelated_prompts
from atomtune.errors import UserError


def test_shipped_prompts_are_many_different_and_plain() -> None:
    prompts = unrelated_prompts()
    assert len(prompts) >= 150
    assert len({prompt.casefold() for prompt in prompts}) == len(prompts)
    for prompt in prompts:
        assert prompt == " ".join(prompt.split())
        assert prompt.isascii()
        assert 3 <= len(prompt.split()) <= 25


def test_split_has_about_its_share_and_loses_nothing() -> None:
    prompts = unrelated_prompts()
    train, held_out = split_held_out(prompts)
    assert sorted(train + held_out) == sorted(prompts)
    assert 0.1 < len(held_out) / len(prompts) < 0.3
    assert split_held_out(prompts) == (train, held_out)
    assert split_held_out(prompts, seed=1)[1] != held_out
    assert set(held_out) < set(split_held_out(prompts, share=0.5)[1])


def test_a_prompts_side_depends_on_its_text_alone() -> None:
    prompts = unrelated_prompts()
    held_out = set(split_held_out(prompts)[1])
    assert set(split_held_out(prompts[::-1])[1]) == held_out
    assert set(split_held_out(prompts[:80])[1]) == held_out & set(prompts[:80])


def test_twins_fall_on_the_same_side() -> None:
    prompts = unrelated_prompts()
    shouted = tuple(f"  {prompt.upper()} " for prompt in prompts)
    train, held_out = split_held_out(prompts + shouted)
    assert {text.strip().lower() for text in train}.isdisjoint(text.strip().lower() for text in held_out)


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_no_side_is_empty(share: float) -> None:
    for seed in range(5):
        train, held_out = split_held_out(["a hill", "a lake", "a road"], share=share, seed=seed)
        assert train
        assert held_out


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
def test_share_must_leave_both_sides(share: float) -> None:
    with pytest.raises(UserError, match="`share` must lie between 0 and 1, got"):
        split_held_out(["a hill", "a lake"], share=share)


@pytest.mark.parametrize("prompts", [[], ["a hill"], ["a hill", "A  hill"]])
def test_too_few_prompts_are_told(prompts: list[str]) -> None:
    with pytest.raises(UserError, match="at least 2 different"):
        split_held_out(prompts)
