"""The config's `unet` section: the diffusion network."""

from __future__ import annotations

from pydantic import Field, model_validator

from core.config.section import Count, Section


class UNet(Section):
    """The network; the defaults are the published weights' shape but for base_channels."""

    base_channels: int = Field(64, gt=0, multiple_of=4)
    channel_multipliers: tuple[Count, ...] = Field((1, 2, 4, 8), min_length=1)
    blocks_per_level: int = Field(2, gt=0)
    norm_groups: int = Field(4, gt=0)
    attention_heads: int = Field(4, gt=0)
    attention_head_channels: int = Field(32, gt=0)
    full_attention_sizes: tuple[int, ...] = Field(
        (), description="feature-map sizes with full attention in place of linear attention (middle is always full)"
    )
    linear_attention: bool = Field(True, description="linear attention on the other levels")
    input_slot: bool = Field(True, description="the published network's unused zero input channel (kept in files)")

    @model_validator(mode="after")
    def _groups_divide(self) -> UNet:
        if self.base_channels % self.norm_groups:
            raise ValueError(f"unet.norm_groups {self.norm_groups} must divide base_channels {self.base_channels}")
        return self
