"""Recipes of whole experiments (package data)."""
