"""Bounds of settings: which values are accepted, and the message for the others."""

import math
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from lmdist.bounds import Bounds, above, at_least, between, check_bounds
from lmdist.errors import UsageError


@dataclass
class Settings:
    free: float = math.nan
    count: Annotated[int, at_least(1)] = 1
    rate: Annotated[float, above(0)] = 1.0
    share: Annotated[float, between(0, 1, includes_high=False)] = 0.0
    probability: Annotated[float, between(0, 1, "1 keeps all", includes_low=False)] = 1.0
    mixture: Annotated[float, between(0, 1)] = 0.5
    heat: Annotated[float, between(0, math.inf, includes_high=False)] = 1.0
    most: Annotated[int, between(0, 1_000_000)] = 0
    kind: Literal["a", "b"] = "a"

    def __post_init__(self) -> None:
        check_bounds(self, "section")


def test_defaults_and_the_ends_that_belong_to_an_interval_are_accepted():
    Settings()
    Settings(count=10**9, rate=1e12, share=0.0, probability=1.0, mixture=0.0, heat=0.0, most=1_000_000, kind="b")
    Settings(mixture=1.0, rate=sys.float_info.min)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("count", 0, "section.count is 0; it must be from 1 to 1,000,000,000,000"),
        ("rate", 0.0, "section.rate is 0.0; it must be above 0 and at most 1,000,000,000,000"),
        ("rate", math.nan, "section.rate is nan; it must be above 0 and at most 1,000,000,000,000"),
        ("share", 1.0, "section.share is 1.0; it must be at least 0 and below 1"),
        ("share", -0.1, "section.share is -0.1; it must be at least 0 and below 1"),
        ("share", math.nan, "section.share is nan; it must be at least 0 and below 1"),
        ("probability", 0.0, "section.probability is 0.0; it must be above 0 and at most 1 (1 keeps all)"),
        ("mixture", 1.1, "section.mixture is 1.1; it must be from 0 to 1"),
        ("mixture", math.nan, "section.mixture is nan; it must be from 0 to 1"),
        ("heat", math.inf, "section.heat is inf; it must be at least 0 and finite"),
        ("most", 1_000_001, "section.most is 1000001; it must be from 0 to 1,000,000"),
        ("kind", "c", "section.kind is 'c'; expected one of a, b"),
    ],
)
def test_a_value_out_of_bounds_is_named_with_what_is_expected(name, value, message):
    with pytest.raises(UsageError) as error:
        Settings(**{name: value})
    assert str(error.value) == message


def test_bounds_above_alone():
    assert str(Bounds(high=3)) == "at most 3"
    assert str(Bounds(high=3, includes_high=False)) == "below 3"
    assert -math.inf in Bounds(high=3)
