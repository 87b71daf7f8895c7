"""Merge several adapters, combined as a recipe file says."""

import adapter_merge as am

am.merge("base", am.read_recipe("recipe.yaml"), "combined")
