"""The recipe that the command line is tried on."""

from recipe.conftest import recipe_fields, write_recipe

__all__ = ["recipe_fields", "write_recipe"]
