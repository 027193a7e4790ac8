"""Floating-point operations of a model by arithmetic, and the share of a chip's peak that they make. No torch."""

from __future__ import annotations

from vitds.model.registry import ModelSpec, draws_subset, drop_path_rates, grid_size, num_kept_patches

# Dense 16-bit matrix peak in FLOP/s by what a device's name contains, from the vendors' datasheets (SXM parts).
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12, "V100": 125e12}


def forward_flops(
    spec: ModelSpec,
    image_size: tuple[int, int],
    num_classes: int,
    pre_logits: int | None = None,
    token_drop: float = 0.0,
    subset_drop_path: float = 0.0,
) -> int:
    """Operations of one image's forward, a multiply-add being two; norms, activations and softmax are not counted.

    In training `token_drop` leaves out patch tokens behind the patch embedding, and drop-path by subset (given by the
    rate of the last block) whole images of a micro-batch in each block; here that share is not rounded.
    """
    grid_h, grid_w = grid_size(spec, image_size)
    num_patches, width = grid_h * grid_w, spec.width
    num_tokens = num_kept_patches(num_patches, token_drop) + (spec.pooling == "token") + spec.registers
    macs, channels = _stem_macs(spec, image_size)
    macs += num_patches * channels * spec.patch_size**2 * width
    linears = num_tokens * (4 * width * width + 2 * width * spec.mlp)
    block = linears + 2 * num_tokens * num_tokens * width
    left_out = sum(rate for rate in drop_path_rates(spec.depth, subset_drop_path) if draws_subset(rate))
    macs += spec.depth * block - round(left_out * block)
    if spec.pooling == "map":
        macs += num_tokens * 2 * width * width + 2 * num_tokens * width + 2 * width * width + 2 * width * spec.mlp
    macs += (pre_logits or width) * num_classes + (width * pre_logits if pre_logits else 0)
    return 2 * macs


# Forward, and twice that backward: gradients of inputs and of weights. Over the truth by the gradient of the images,
# which nobody computes (0.2 % of ViT-B_16). What activation checkpointing computes again is not counted.
TRAINING_FACTOR = 3


def mfu(flops_per_image: int, images_per_s: float, num_devices: int, device_name: str) -> float | None:
    """Model FLOPs utilisation in [0, 1]: an image's training operations over the 16-bit peak.

    None for a device whose peak is not in the table.
    """
    peak = peak_flops(device_name)
    return None if peak is None else TRAINING_FACTOR * flops_per_image * images_per_s / (peak * num_devices)


def peak_flops(device_name: str) -> float | None:
    """Dense 16-bit matrix peak of a device in FLOP/s, None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


def describe_mfu(flops_per_image: int, num_devices: int, device_name: str) -> str:
    """What the MFU of a run's log is a share of."""
    work = f"{TRAINING_FACTOR} x {flops_per_image / 1e9:.4g} GFLOP an image (forward; recomputation not counted)"
    peak = peak_flops(device_name)
    if peak is None:
        return f"MFU  not given, {device_name} has no peak on record; {work}"
    return f"MFU  {work} over {num_devices} x {peak / 1e12:.4g} TFLOP/s, the dense 16-bit peak of {device_name}"


def _stem_macs(spec: ModelSpec, image_size: tuple[int, int]) -> tuple[int, int]:
    """Multiply-adds of the ResNet stem, and the channels of the map that is cut into patches."""
    if spec.resnet is None:
        return 0, spec.in_channels
    height, width = (-(-side // 2) for side in image_size)  # the root's stride; SAME rounds up
    channels = spec.resnet_width
    macs = 7 * 7 * spec.in_channels * channels * height * width
    height, width = -(-height // 2), -(-width // 2)  # the pool's
    for stage, units in enumerate(spec.resnet):
        inner = spec.resnet_width * 2**stage
        for unit in range(units):
            macs += channels * inner * height * width
            if unit == 0 and stage > 0:
                height, width = -(-height // 2), -(-width // 2)
            macs += (9 * inner * inner + 4 * inner * inner) * height * width
            if unit == 0:
                macs += channels * 4 * inner * height * width  # the projection on the residual road
            channels = 4 * inner
    return macs, channels
