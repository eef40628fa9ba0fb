"""Policies: what is finetuned. Foreign models are wrapped once, at this border, as ε-predictors."""
