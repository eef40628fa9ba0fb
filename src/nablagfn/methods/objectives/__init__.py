"""Objectives: what is minimised. An objective sees protocols, never a diffusers class."""
