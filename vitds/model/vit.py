"""The Vision Transformer: images are cut into patches, patches become tokens, tokens become one feature, then logits.

    images (B, C, H, W) --tokens--> (B, T, D) --encode--> (B, T, D) --pool--> (B, D) --head--> (B, L)

Numbers are Google's to 2e-5. Parameter names are frozen: weights, checkpoints and optimizer groups rely on them.
Under ZeRO stage 3 a module's parameters exist only while that module's own forward runs, so no module here reads
another's; the tokens and positions that belong to the root are used inside the root's forward.

Shapes: B images, C channels, H W pixels, T tokens, D width, L classes.
Source: "An Image is Worth 16x16 Words" (Dosovitskiy et al., 2021); google-research/vision_transformer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from vitds.model.activation_checkpointing import ActivationCheckpointing
from vitds.model.blocks import AttentionPool, Block, Dense, LayerNorm
from vitds.model.positions import sincos2d_positions
from vitds.model.registry import ModelSpec, drop_path_rates, grid_size, num_kept_patches
from vitds.model.resnet_stem import ResNetStem, lecun_normal_


class PatchEmbed(nn.Conv2d):
    """Cut a map into patches and project each to a token: a convolution's parameters, as one matrix product.

    A convolution kernel is slower at strides this long, 1.1 to 1.3 times on a CPU (BENCHMARKS.md).
    """

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__(channels, width, kernel_size=patch_size, stride=patch_size)

    def reset_parameters(self) -> None:
        """Draw the kernel as flax does; the bias starts at zero."""
        lecun_normal_(self.weight)
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, C, H, W) -> (B, T, D), row by row."""
        side = self.kernel_size[0]
        cells = x.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (B, C, rows, side, columns, side)
        patches = cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return linear(patches, self.weight.flatten(1), self.bias)


class Head(nn.Linear):
    """The classifier: an optional dense layer with tanh (`pre_logits`), then a linear layer that starts at zero."""

    def __init__(self, width: int, num_classes: int, pre_logits: int | None = None) -> None:
        super().__init__(pre_logits or width, num_classes)
        self.pre_logits: nn.Linear | None = None
        if pre_logits:
            self.pre_logits = nn.Linear(width, pre_logits)
            lecun_normal_(self.pre_logits.weight)
            nn.init.zeros_(self.pre_logits.bias)

    def reset_parameters(self) -> None:
        """Start at zero: every class is equally likely, and a new head cannot disturb pre-trained features."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Shapes: (B, D) -> (B, L)."""
        if self.pre_logits is not None:
            features = torch.tanh(self.pre_logits(features))
        return super().forward(features)


class VisionTransformer(nn.Module):
    """A ViT of the given architecture, image size and classes, with Google's initial values.

    Units: image_size is (height, width) in pixels; num_classes is 0 for a model without a head, whose output is its
    features; pre_logits is the width of that layer, None for none; drop_path is the rate of the last block, the others'
    rise linearly towards it; token_drop is the share of patch tokens that training leaves out.
    Raises: ConfigError when the image size does not fit the patches.
    """

    def __init__(
        self,
        spec: ModelSpec,
        image_size: tuple[int, int],
        num_classes: int,
        pre_logits: int | None = None,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        drop_path_subset: bool = False,
        token_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.image_size = (image_size[0], image_size[1])
        self.num_classes = num_classes
        self.grid_hw = grid_size(spec, image_size)
        self.dropout = dropout
        self.token_drop = token_drop
        self.activation_checkpointing = ActivationCheckpointing()

        self.stem: ResNetStem | None = None
        if spec.resnet is not None:
            self.stem = ResNetStem(spec.in_channels, spec.resnet_width, spec.resnet)
        channels = self.stem.out_channels if self.stem is not None else spec.in_channels
        self.patch_embed = PatchEmbed(channels, spec.width, spec.patch_size)

        has_class_token = spec.pooling == "token"
        num_positions = self.grid_hw[0] * self.grid_hw[1] + has_class_token
        self.cls_token = nn.Parameter(torch.zeros(1, 1, spec.width)) if has_class_token else None
        if spec.positions == "sincos2d":
            positions = torch.as_tensor(sincos2d_positions(self.grid_hw, spec.width, has_class_token))
        else:
            positions = torch.empty(1, num_positions, spec.width).normal_(std=0.02)
        self.pos_embed = nn.Parameter(positions, requires_grad=spec.positions == "learned")
        self.reg_token: nn.Parameter | None = None
        if spec.registers:
            self.reg_token = nn.Parameter(torch.empty(1, spec.registers, spec.width).normal_(std=1e-6))
        self.num_prefix_tokens = has_class_token + spec.registers  # tokens before the first patch
        self.pos_dropout = nn.Dropout(dropout)

        rates = drop_path_rates(spec.depth, drop_path)
        self.blocks = nn.ModuleList(Block(spec, dropout, rate, drop_path_subset) for rate in rates)
        self.norm = LayerNorm(spec.width, spec.norm_eps)
        self.attn_pool = AttentionPool(spec) if spec.pooling == "map" else None
        self.head = Head(spec.width, num_classes, pre_logits) if num_classes else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Shapes: (B, C, H, W) -> (B, L), or (B, D) without a head.

        The images have the parameters' dtype, values in [-1, 1] by convention.
        """
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """What the head sees; under token pooling the class token after the last norm.

        Shapes: (B, C, H, W) -> (B, D).
        """
        return self.pool(self.encode(self.tokens(images)))

    def tokens(self, images: Tensor) -> Tensor:
        """Class token, registers, then patches with their positions. Shapes: (B, C, H, W) -> (B, T, D)."""
        if images.shape[-2:] != self.image_size:
            raise ValueError(f"images of {tuple(images.shape[-2:])} pixels, the model was built for {self.image_size}")
        x = images if self.stem is None else self.activation_checkpointing.run(self.stem.blocks(), images)
        x = self.patch_embed(x)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.pos_dropout(x + self.pos_embed)
        if self.token_drop and self.training:
            x = self._some_patches(x)
        if self.reg_token is not None:
            num_first = self.num_prefix_tokens - self.spec.registers  # registers have no position and follow the class
            x = torch.cat([x[:, :num_first], self.reg_token.expand(x.shape[0], -1, -1), x[:, num_first:]], dim=1)
        return x

    def _some_patches(self, x: Tensor) -> Tensor:
        """The class token, and of each image's patches an even draw of a fixed number. Shapes: (B, T, D) -> (B, T', D).

        Source: Liu et al., "PatchDropout" (2023); Li et al., "Scaling Language-Image Pre-training via Masking" (2023).
        """
        num_first = x.shape[1] - self.grid_hw[0] * self.grid_hw[1]
        first, patches = x[:, :num_first], x[:, num_first:]
        num_kept = num_kept_patches(patches.shape[1], self.token_drop)
        kept = torch.rand(patches.shape[:2], device=x.device).argsort(dim=1)[:, :num_kept]
        return torch.cat([first, patches.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))], dim=1)

    def encode(self, tokens: Tensor) -> Tensor:
        """All blocks and the last norm. Shapes: (B, T, D) -> (B, T, D)."""
        return self.norm(self.activation_checkpointing.run(self.blocks, tokens))

    def pool(self, tokens: Tensor) -> Tensor:
        """The class token, the mean over patches, or what the attention pool gathers. Shapes: (B, T, D) -> (B, D)."""
        if self.attn_pool is not None:
            return self.attn_pool(tokens)
        return tokens[:, 0] if self.cls_token is not None else tokens[:, self.num_prefix_tokens :].mean(dim=1)

    def set_activation_checkpointing(self, mode: str | int, offload_to_cpu: bool = False) -> None:
        """Choose what is computed again in backward: none, full, selective, or K for every K-th block.

        Raises: ConfigError for another mode.
        """
        self.activation_checkpointing = ActivationCheckpointing.parse(mode, offload_to_cpu)

    def use_fp8(self) -> None:
        """Let the linear layers of every encoder block multiply in 8 bits in training, with parameters in bfloat16."""
        for module in self.blocks.modules():
            if isinstance(module, Dense):
                module.is_fp8 = True

    def compile_blocks(self, mode: str = "default", backend: str = "inductor") -> None:
        """Compile every encoder block in place, for training; after the choice of activation checkpointing.

        `mode` is one of `torch.compile`'s, and only inductor has any. Dropout is drawn from torch's generator, as
        without compilation, where inductor would have one of its own.
        """
        options: dict[str, Any] = {}
        if backend == "inductor":
            options["options"] = torch._inductor.list_mode_options(mode) | {"fallback_random": True}
        for block in self.blocks:
            assert isinstance(block, Block)
            block.compile_training(self.activation_checkpointing, backend=backend, **options)
