"""Estimators of the value gradient ∇ log F̃(x_{k+1}); one small file each."""
