"""Configurations: a field's value is checked against its type and the bounds that are declared beside it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

import pytest
from support.tiny import tiny_model

from d4s.configuration import Above, AtLeast, AtMost, Below, Configuration, Length
from d4s.errors import ConfigError
from d4s.methods import method_for
from d4s.methods.d4s import D4S
from d4s.models.architectures import Anatomy


@dataclass(frozen=True, kw_only=True)
class Settings(Configuration):
    """One field of each kind."""

    rounds: Annotated[int, "a count", AtLeast(1), AtMost(2_000)] = 3
    weight: Annotated[float | None, "a weight, or none", Above(0, "0 would be another method")] = 1.5
    share: Annotated[float, "a share", AtLeast(0), Below(1)] = 0.5
    beyond: Annotated[float, Above(-2)] = 0
    layers: Annotated[tuple[int, ...], "one of them", AtLeast(0), Length(1, "one layer is changed")] = (4,)
    kind: Literal["base", "current"] = "base"
    plain: bool = False


@dataclass(frozen=True, kw_only=True)
class Many(Settings):
    """Declares a field anew, and inherits the others."""

    name = "many"
    layers: Annotated[tuple[int, ...], "any number of them", AtLeast(0)] = (1, 2, 3)


KEPT: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("rounds", (1, 2, 2_000)),
    ("weight", (1e-300, 7, 10**300, None)),
    ("share", (0, 0.0, 0.999)),
    ("beyond", (-1.999, 0)),
    ("layers", ((0,), (9,))),
    ("kind", ("base", "current")),
    ("plain", (True, False)),
)

BROKEN = (
    ("rounds", 0, "Settings: rounds is 0, must be 1 or more"),
    ("rounds", 2_001, "Settings: rounds is 2001, must be at most 2,000"),
    ("rounds", -(10**300), "must be 1 or more"),
    ("weight", 0.0, "Settings: weight is 0.0, must be positive (0 would be another method)"),
    ("weight", -1, "must be positive"),
    ("share", -0.1, "must be 0 or more"),
    ("share", 1, "Settings: share is 1, must be below 1"),
    ("beyond", -2, "Settings: beyond is -2, must be above -2"),
    ("layers", (-1,), "Settings: layers is (-1,), must be 0 or more"),
    ("layers", (), "Settings: layers is (), must be a list of 1 (one layer is changed)"),
    ("layers", (1, 2), "Settings: layers is (1, 2), must be a list of 1 (one layer is changed)"),
    # What is of another type is said to be that, and is compared with no bound.
    ("rounds", "abc", "Settings: rounds is 'abc', must be a whole number"),
    ("rounds", True, "must be a whole number"),
    ("rounds", 1.0, "must be a whole number"),
    ("rounds", None, "must be a whole number"),
    ("weight", "abc", "Settings: weight is 'abc', must be a finite number or none"),
    ("weight", [1], "must be a finite number or none"),
    ("weight", float("nan"), "must be a finite number or none"),
    ("weight", 10**400, "must be a finite number or none"),
    ("layers", ("x",), "Settings: layers is ('x',), must be a list, each of it a whole number"),
    ("layers", 4, "must be a list, each of it a whole number"),
    ("kind", "nearest", "Settings: kind is 'nearest', must be 'base' or 'current'"),
    ("plain", 1, "Settings: plain is 1, must be true or false"),
    ("kind", "n" * 9_999, "n…, must be"),
)


@pytest.mark.parametrize(("field", "values"), KEPT, ids=lambda part: part if isinstance(part, str) else "")
def test_values_within_their_bounds_are_kept_as_they_are(field, values):
    for value in values:
        assert getattr(Settings(**{field: value}), field) is value


@pytest.mark.parametrize(("field", "value", "says"), BROKEN)
def test_a_value_that_is_not_right_is_named_with_what_would_be(field, value, says):
    with pytest.raises(ConfigError) as refused:
        Settings(**{field: value})
    assert says in str(refused.value) and len(str(refused.value)) < 300
    with pytest.raises(ConfigError):
        replace(Settings(), **{field: value})


def test_a_field_that_is_declared_anew_has_its_own_bounds_and_the_others_theirs():
    assert Many(layers=()).layers == ()
    with pytest.raises(ConfigError, match=r"many: layers is \(1, -1\), must be 0 or more"):
        Many(layers=(1, -1))
    with pytest.raises(ConfigError, match="many: rounds is 0, must be 1 or more"):
        Many(rounds=0)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("prior_weight", "abc", "d4s: prior_weight is 'abc', must be a finite number or none"),
        ("prior_weight", [1, 2], "d4s: prior_weight is [1, 2], must be a finite number or none"),
        ("layers", "x", "d4s: layers is ('x',), must be a list, each of it a whole number"),
        ("layers", None, "d4s: layers is None, must be a list, each of it a whole number"),
        ("steps", "many", "TargetConfig: steps is 'many', must be a whole number"),
        ("target", 3, "d4s: target is 3, must be a TargetConfig"),
        ("target", {"clamp": None}, "TargetConfig: clamp is None, must be a finite number"),
    ],
)
def test_what_is_asked_of_a_method_and_does_not_fit_is_named(field, value, says):
    with pytest.raises(ConfigError) as refused:
        D4S(layers=(0,)).changed({field: value})
    assert str(refused.value) == says


@pytest.mark.parametrize("config", [[1], 3, {1: 2}, "prior_weight"])
def test_a_configuration_of_another_kind_is_refused(config):
    with pytest.raises(ConfigError, match=r"must be a mapping of fields of d4s|unknown field of d4s '1'"):
        method_for("d4s", Anatomy(tiny_model("gpt2", 1)), config)


def test_a_field_that_an_earlier_version_lacks_counts_where_it_is_not_at_its_default():
    method = method_for("d4s", Anatomy(tiny_model("gpt2", 0)))
    stored = asdict(method)
    assert method.as_known_to(stored) == stored
    del stored["context_keys"], stored["target"]["target_stop"]
    assert method.as_known_to(stored) == stored
    changed = replace(method, context_keys="each")
    assert changed.as_known_to(stored) == {**stored, "context_keys": "each"}
    stopped = replace(method, target=replace(method.target, target_stop=True))
    assert stopped.as_known_to(stored) == {**stored, "target": {**stored["target"], "target_stop": True}}
    del stored["layers"]  # no default
    assert method.as_known_to(stored) != stored
