"""A grid of plans: the axes of a sweep, and the outcome of each combination of their values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product

from pydantic import Field

from ..recipes.errors import FituneError, Problem, RecipeError
from .plan import Plan
from .strategy import Value
from .views import Case, Outcome, Rehearser, plan_cases, sum_up


class Axis(Value):
    """A key of the recipe and the values to try.

    key:    dotted, such as `train.micro_batch_size`
    values: one or more, as on the command line
    """

    key: str
    values: tuple[str, ...] = Field(min_length=1)


class Cell(Outcome):
    """One combination of a sweep's values.

    settings: dotted key to value, as on the command line
    """

    settings: dict[str, str]


class FailedCell(Value):
    """A combination that makes no valid recipe or that no strategy can follow.

    settings: dotted key to value, as on the command line
    error:    why
    """

    settings: dict[str, str]
    error: str


def parse_axes(words: Sequence[str]) -> tuple[Axis, ...]:
    """Axes of a sweep such as `train.micro_batch_size=1,2,4`. Raises RecipeError with all that is wrong with them.

    A comma within quotes or brackets does not separate values.
    """
    axes: list[Axis] = []
    problems = []
    for word in words:
        key, equals, written = (part.strip() for part in word.partition("="))
        values = tuple(value.strip() for value in _split_values(written))
        problem = partial(Problem, where=f"--sweep {word if word.isprintable() else ascii(word)}")
        if not equals or key.count(".") != 1 or not all(key.split(".")):
            form = "table.key=value,value, such as train.micro_batch_size=1,2"
            problems.append(problem(what=f"is not of the form {form}"))
        elif not all(values):
            problems.append(problem(what="has an empty value", hint="write the values with one comma between them"))
        elif len(set(values)) < len(values):
            problems.append(problem(what="has a value more than once"))
        elif key in (axis.key for axis in axes):
            problems.append(problem(what=f"{key} is swept more than once", hint="give all its values at once"))
        else:
            axes.append(Axis(key=key, values=values))
    if problems:
        raise RecipeError(problems)
    return tuple(axes)


def _split_values(text: str) -> Iterator[str]:
    value, depth, quote = "", 0, ""
    for character in text:
        if character == "," and not depth and not quote:
            yield value
            value = ""
            continue
        value += character
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        else:
            depth += (character in "[{") - (character in "]}")
    yield value


def make_grid(
    axes: Sequence[Axis], make_case: Callable[[Mapping[str, str]], Case], rehearser: Rehearser | None = None
) -> tuple[Cell | FailedCell, ...]:
    """The plan of every combination, the last axis changing fastest; where none makes a plan, the first one's error.

    make_case: for one combination of settings; raises FituneError where it is no valid recipe
    """
    grid = [
        {axis.key: value for axis, value in zip(axes, values, strict=True)}
        for values in product(*(axis.values for axis in axes))
    ]
    made = [_try(make_case, settings) for settings in grid]
    planned = iter(plan_cases([one for one in made if isinstance(one, Case)], rehearser))
    plans = [next(planned) if isinstance(one, Case) else one for one in made]
    errors = [one for one in plans if isinstance(one, FituneError)]
    if len(errors) == len(plans):
        raise errors[0]
    return tuple(
        Cell(settings=settings, **sum_up(one))
        if isinstance(one, Plan)
        else FailedCell(settings=settings, error=str(one))
        for settings, one in zip(grid, plans, strict=True)
    )


def _try(make_case: Callable[[Mapping[str, str]], Case], settings: Mapping[str, str]) -> Case | FituneError:
    try:
        return make_case(settings)
    except FituneError as error:
        return error
