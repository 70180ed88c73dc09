"""Recipes: a model, its data and an ordered list of stages, run as one resumable job."""
