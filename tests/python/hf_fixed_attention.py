"""A causal model whose attention transformers does not let anyone exchange, as older models are.

transformers decides that by the source of a model's module: a class like the one below, and no call
of its attention interface. Its own models of that kind become fewer with every release.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


class FixedAttention(nn.Module):
    is_causal = True


class FixedModel(PreTrainedModel):
    config_class = PreTrainedConfig

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.attention = FixedAttention()
        self.post_init()
