"""tiny-animals-flow towards warm colours, beside its exact target (`make demo-flow`)."""

from ...config import Config
from . import warmth


def get_config() -> Config:
    """The recipe of `make demo`, on a flow model: as it is but for what the model asks."""
    config = warmth.get_config()
    config.pretrained.model = "tiny-animals-flow"
    config.sampling.spacing = "leading"  # the model's own shift; at σ = 1 the log-SNR is infinite
    config.sampling.max_sequence_length = 1  # it has no T5, and learned with 1 zero in its place
    config.pool.shift_start = False  # its first state is noise without any signal
    return config
