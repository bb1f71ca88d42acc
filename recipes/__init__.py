"""What the user wants: the recipe, its schema, units, loading, and the recipes that ship. Never imports torch."""

from __future__ import annotations

from .data_table import DataSource, DataTable
from .errors import (
    DataError,
    DeviceError,
    FituneError,
    ModelError,
    OutOfMemoryError,
    PlanError,
    Problem,
    RecipeError,
    RunError,
)
from .load import RecipeFile, load_recipe, parse_recipe, recipe_from_resolved
from .schema import (
    BudgetTable,
    MethodTable,
    ModelTable,
    OutputTable,
    Recipe,
    TrainTable,
    make_schema,
)
from .shipped import ShippedRecipe, list_shipped, make_starter, read_shipped
from .units import GiB, KiB, MiB, format_bytes, format_count, parse_bytes, parse_count

__all__ = [
    "BudgetTable",
    "DataError",
    "DataSource",
    "DataTable",
    "DeviceError",
    "FituneError",
    "GiB",
    "KiB",
    "MethodTable",
    "MiB",
    "ModelError",
    "ModelTable",
    "OutOfMemoryError",
    "OutputTable",
    "PlanError",
    "Problem",
    "Recipe",
    "RecipeError",
    "RecipeFile",
    "RunError",
    "ShippedRecipe",
    "TrainTable",
    "format_bytes",
    "format_count",
    "list_shipped",
    "load_recipe",
    "make_schema",
    "make_starter",
    "parse_bytes",
    "parse_count",
    "parse_recipe",
    "read_shipped",
    "recipe_from_resolved",
]
