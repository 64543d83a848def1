"""What all sections are made of: types of values, and `Section`."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
BelowOne = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # numpy's generators take no more
Text = Annotated[str, Field(min_length=1)]


def check_regex(pattern: str) -> str:
    """``pattern`` itself, if ``re`` compiles it; ValueError with ``re``'s reason otherwise."""
    if not pattern:
        raise ValueError("an empty regex matches everything")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from None
    return pattern


def check_renames(renames: dict[str, str]) -> dict[str, str]:
    """``renames`` itself, if each replacement fits its regex's groups; ValueError naming the pair otherwise."""
    for pattern, replacement in renames.items():
        try:
            # The empty alternative makes every pattern match, so that `re` parses the replacement now.
            re.compile(pattern + "|").sub(replacement, "")
        except (re.error, IndexError) as error:
            raise ValueError(
                f"expected a replacement that fits its regex {pattern!r}, found {replacement!r} ({error})"
            ) from None
    return renames


Regex = Annotated[str, AfterValidator(check_regex)]


class Section(BaseModel):
    """A section of the config: unknown keys are errors, values are not coerced between kinds."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )
