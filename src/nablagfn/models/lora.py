"""Which layers get a LoRA. Needs no torch."""

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # the linear maps of diffusers' attention
