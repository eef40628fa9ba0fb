"""Figures of a model from the features [n, D] of its samples. Pure functions, float64 inside.

Where a figure takes `counts` [R, n], it is computed R times, row i taken counts[r, i] times
(`intervals.resampled_counts`), and is [R] then; otherwise it is a scalar. Pairs of a sample with
itself never count, so that resampling does not shift what is made of pairs. The figures that are
not made of means or pairs have an `…_influence` [n] instead: h with
figure(counts) ≈ figure + counts @ h and Σ h = 0 (jackknife; Efron 1982).
"""
