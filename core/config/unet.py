"""The config's `unet` section: the diffusion network."""

from __future__ import annotations

from pydantic import model_validator

from core.config.section import Count, Section, setting


class UNet(Section):
    """The network; the defaults are the published weights' shape but for base_channels."""

    base_channels: int = setting(64, "channels at the image's own size; the published weights have 256", gt=0,
                                 multiple_of=4)
    channel_multipliers: tuple[Count, ...] = setting(
        (1, 2, 4, 8), "channels of each level in base_channels; each level halves the size", min_length=1)
    blocks_per_level: Count = setting(2, "residual blocks of a level, going down and going up")
    norm_groups: Count = setting(4, "groups of the group normalisation")
    attention_heads: Count = setting(4, "heads of every attention")
    attention_head_channels: Count = setting(32, "channels of an attention head")
    full_attention_sizes: tuple[int, ...] = setting(
        (), "feature-map sizes with full attention in place of linear attention (middle is always full)")
    linear_attention: bool = setting(True, "linear attention on the other levels")
    input_slot: bool = setting(True, "the published network's unused zero input channel (kept in files)")

    @model_validator(mode="after")
    def _groups_divide(self) -> UNet:
        if self.base_channels % self.norm_groups:
            raise ValueError(f"unet.norm_groups {self.norm_groups} must divide base_channels {self.base_channels}")
        return self
