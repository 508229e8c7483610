"""Recipes of the LLaVA stages (package data)."""
