"""The names and shapes of our own parameters, which is also the layout of weights that vitds writes. No torch."""

from __future__ import annotations

from vitds.layouts.array import ForeignArray
from vitds.model.registry import ModelSpec, pixels_per_token


def parameters(
    spec: ModelSpec, num_positions: int, num_classes: int, pre_logits: int | None = None
) -> dict[str, tuple[int, ...]]:
    """Every parameter of a model by name, with its shape; the other layouts are renamings of this table.

    A test compares it with the model itself.
    """
    width, head_width = spec.width, spec.width // spec.heads
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str, size: int) -> None:
        shapes.update({f"{name}.weight": (size,), f"{name}.bias": (size,)})

    def dense(name: str, num_in: int, num_out: int) -> None:
        shapes.update({f"{name}.weight": (num_out, num_in), f"{name}.bias": (num_out,)})

    channels = spec.in_channels
    if spec.resnet is not None:
        channels = spec.resnet_width
        shapes["stem.conv_root.weight"] = (channels, spec.in_channels, 7, 7)
        norm("stem.gn_root", channels)
        for stage, units in enumerate(spec.resnet):
            inner = spec.resnet_width * 2**stage
            for unit in range(units):
                ours = f"stem.block{stage + 1}.unit{unit + 1}"
                convolutions = [("1", 1, channels, inner), ("2", 3, inner, inner), ("3", 1, inner, 4 * inner)]
                for suffix, size, fan_in, fan_out in convolutions + [("_proj", 1, channels, 4 * inner)] * (unit == 0):
                    shapes[f"{ours}.conv{suffix}.weight"] = (fan_out, fan_in, size, size)
                    norm(f"{ours}.gn{suffix}", fan_out)
                channels = 4 * inner
    shapes["patch_embed.weight"] = (width, channels, spec.patch_size, spec.patch_size)
    shapes["patch_embed.bias"] = (width,)
    if spec.pooling == "token":
        shapes["cls_token"] = (1, 1, width)
    shapes["pos_embed"] = (1, num_positions, width)
    if spec.registers:
        shapes["reg_token"] = (1, spec.registers, width)
    for i in range(spec.depth):
        norm(f"blocks.{i}.norm1", width)
        dense(f"blocks.{i}.attn.qkv", width, 3 * width)
        if spec.qk_norm:
            norm(f"blocks.{i}.attn.q_norm", head_width)
            norm(f"blocks.{i}.attn.k_norm", head_width)
        dense(f"blocks.{i}.attn.proj", width, width)
        norm(f"blocks.{i}.norm2", width)
        dense(f"blocks.{i}.mlp.fc1", width, spec.mlp)
        dense(f"blocks.{i}.mlp.fc2", spec.mlp, width)
        if spec.layer_scale is not None:
            shapes |= {f"blocks.{i}.ls1.gamma": (width,), f"blocks.{i}.ls2.gamma": (width,)}
    norm("norm", width)
    if spec.pooling == "map":
        shapes["attn_pool.latent"] = (1, 1, width)
        dense("attn_pool.q", width, width)
        dense("attn_pool.kv", width, 2 * width)
        dense("attn_pool.proj", width, width)
        norm("attn_pool.norm", width)
        dense("attn_pool.mlp.fc1", width, spec.mlp)
        dense("attn_pool.mlp.fc2", spec.mlp, width)
    if pre_logits is not None:
        dense("head.pre_logits", width, pre_logits)
    if num_classes:
        dense("head", pre_logits or width, num_classes)
    return shapes


def own_layout(
    spec: ModelSpec, image_size: tuple[int, int], num_classes: int, pre_logits: int | None = None
) -> tuple[ForeignArray, ...]:
    """Our own names, as a layout among the others."""
    pixels = pixels_per_token(spec)
    num_positions = (image_size[0] // pixels) * (image_size[1] // pixels) + (spec.pooling == "token")
    table = parameters(spec, num_positions, num_classes, pre_logits)
    return tuple(ForeignArray(name, shape, name) for name, shape in table.items())
