"""The "vitds" section of an experiment: one dataclass says what a run may set, its default, its range and its unit."""

from __future__ import annotations

import dataclasses
import functools
import operator
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from vitds.document import Document, Kind, check_value, show
from vitds.errors import ConfigError, did_you_mean

_BOUNDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


def _entry(default: Any, help: str, **bounds: float) -> Any:
    """A field with one line of help and, for numbers, its range in the words of _BOUNDS."""
    return field(default=default, metadata={"help": help, "bounds": bounds})


@dataclass(frozen=True)
class DataConfig:
    """Which images, and what happens to one on its way to the model."""

    path: str | None = _entry(
        None, "dataset directory or URL; several with commas, a mixture; or bare tars, URL-{000..127}.tar"
    )
    val_path: str | None = _entry(None, "dataset directory whose val split to validate on; else that of data.path")
    weights: tuple[float, ...] = _entry((), "share of each directory of a mixture; else all are one data set", above=0)
    sampling: Literal["natural", "balanced"] = _entry(
        "natural", "natural: each sample once an epoch; balanced: each class equally often"
    )
    repeats: int = _entry(1, "times that each image of a global batch is in it, augmented anew each time", at_least=1)
    shuffle_window: int | None = _entry(
        None, "shards shuffled together, 0 is all; else all of local data, 16 of remote data", at_least=0
    )
    samples_per_epoch: int | None = _entry(
        None, "of tar streams without an index, as --data 'URL-{000..127}.tar'", at_least=1
    )
    shuffle_buffer: int = _entry(1000, "samples that a worker shuffles in such a stream", at_least=1)
    allow_pipe: bool = _entry(False, "run the commands of pipe: streams")
    cache_dir: str | None = _entry(None, "where shards from URLs are kept; else vitds in the user's cache directory")
    cache_gib: float = _entry(50.0, "size of that cache in GiB, of all ranks of a machine together", above=0)
    recipe: str | None = _entry(
        None, "a paper's augmentation where nothing else is given: vit-finetune, augreg-medium1, ..., deit3"
    )
    train_crop: Literal["random", "pad", "simple", "none"] = _entry(
        "random",
        "random: resized crop; none: squash; pad: squash, pad 4 px, crop; simple: that, aspect kept",
    )
    crop_scale: tuple[float, float] = _entry(
        (0.05, 1.0), "area of a random crop as a share of the image, lowest and highest", above=0, at_most=1
    )
    crop_ratio: tuple[float, float] = _entry(
        (0.75, 4 / 3), "width / height of a random crop, lowest and highest", above=0
    )
    flip: float = _entry(0.5, "probability of a horizontal flip", at_least=0, at_most=1)
    randaugment_layers: int = _entry(0, "RandAugment's operations on each training image, 0 is off", at_least=0)
    randaugment_magnitude: float = _entry(10.0, "their strength, as big_vision counts it", at_least=0, at_most=30)
    eval_crop: Literal["squash", "center"] = _entry(
        "squash", "squash: resize to image_size, aspect lost; center: resize the shorter side, cut the centre"
    )
    crop_fraction: float = _entry(
        0.875, "eval_crop center: image_size / shorter side after the resize", above=0, at_most=1
    )
    interpolation: Literal["bilinear", "bicubic"] = _entry("bilinear", "filter of every resize")
    resampling: Literal["fast", "exact"] = _entry(
        "fast", "fast: torch's resize; exact: Pillow's, as torchvision does on PIL images, bit for bit"
    )
    three_augment: bool = _entry(False, "one of grey, solarise and blur on each training image (3-Augment)")
    color_jitter: float = _entry(0.0, "strength of random brightness, contrast and saturation, 0 is off", at_least=0)
    erase: float = _entry(0.0, "probability of erasing a random box (random erasing)", at_least=0, at_most=1)
    mean: float | tuple[float, ...] = _entry(0.5, "subtracted from pixels in [0, 1], one number or one per channel")
    std: float | tuple[float, ...] = _entry(0.5, "divides after the mean, one number or one per channel", above=0)
    mixup_alpha: float = _entry(0.0, "Beta(alpha, alpha) of mixup, 0 is off", at_least=0)
    cutmix_alpha: float = _entry(0.0, "Beta(alpha, alpha) of cutmix, 0 is off", at_least=0)
    cutmix_share: float = _entry(0.5, "share of pairs with cutmix where mixup is on too", at_least=0, at_most=1)
    mixed_targets: Literal["shares", "ones"] = _entry(
        "shares", "of mixup and cutmix: each class by its share of the picture, or 1 (DeiT III, with loss bce)"
    )

    @property
    def mixes_pairs(self) -> bool:
        """Whether mixup or cutmix take neighbours together, so that a micro-batch must be even."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0


@dataclass(frozen=True)
class RunConfig:
    """What a run is, beyond DeepSpeed's own keys. Steps are global steps; None means "follows from the rest"."""

    model: str | None = _entry(None, "model name, or custom:width=64,depth=4,heads=4,mlp=128,patch=4")
    image_size: int | tuple[int, int] | None = _entry(
        None, "pixels, one side or [height, width]; else the weights' or 224", at_least=1
    )
    num_classes: int | None = _entry(None, "outputs of the head; else as many as the data has", at_least=1)
    pre_logits: int | None = _entry(None, "width of a tanh layer before a new head; else none", at_least=1)
    dropout: float = _entry(0.0, "probability, after every dense layer and the position embedding", at_least=0, below=1)
    drop_path: float = _entry(
        0.0, "probability of skipping the last block, linear from 0 at the first", at_least=0, below=1
    )
    drop_path_subset: bool = _entry(
        False, "drop_path above 0.1 leaves out that share of each micro-batch exactly, and computes only the rest"
    )
    token_drop: float = _entry(
        0.0, "share of the patch tokens that training leaves out, drawn anew for each image", at_least=0, below=1
    )
    activation_checkpointing: Literal["none", "selective", "full", "auto"] | int | None = _entry(
        None,
        "recompute activations: none, selective, full, every K-th block, or auto: as the GPU's memory asks",
        at_least=1,
    )
    auto_micro_batch: bool = _entry(
        False, "out of memory in the first two steps: begin again with half the micro-batch, the global batch kept"
    )
    attention: Literal["auto", "flash", "cudnn", "efficient", "math"] = _entry(
        "auto", "back end of torch that computes it, checked at the start; auto: left to torch"
    )
    compile: bool | Literal["max-autotune-no-cudagraphs"] = _entry(
        False, "torch.compile of each encoder block, for training: true, or a mode; the first step waits for it"
    )
    fp8: bool = _entry(
        False, "training multiplies in 8 bits in the blocks' linear layers, checked at the start; needs bf16"
    )
    name: str | None = _entry(None, "directory of the run; else model and data set")
    output_dir: str = _entry("runs", "directory that holds the runs")
    pretrained: str | None = _entry(None, "weights to start from: a file, a timm or Hugging Face directory, or a run")
    num_steps: int | None = _entry(None, "length of the run in global steps, and of the schedule", at_least=1)
    epochs: float | None = _entry(None, "length of the run in epochs, rounded up to a whole step", above=0)
    stop_at_step: int | None = _entry(
        None, "save and leave with exit code 75 at this step; the schedule stays", at_least=1
    )
    train: str = _entry(
        "all", "which parameters: all, head, or last-K (the last K blocks, the final norm and the head)"
    )
    eval_batch_size: int = _entry(64, "images of one rank's validation batch", at_least=1)
    eval_every: int | None = _entry(None, "steps between validations; else only at the end", at_least=1)
    save_every: int | None = _entry(None, "steps between checkpoints; else only at the end", at_least=1)
    log_every: int = _entry(10, "steps between lines of metrics", at_least=1)
    log_block_norms: bool = _entry(False, "gradient norm of each block in the metrics")
    profile: str | None = _entry(
        None, "STEP:COUNT, steps whose time is told by phase, with a trace for Perfetto in the run's directory"
    )
    keep_last: int = _entry(3, "newest checkpoints to keep, the best one beside them", at_least=1)
    resume: str = _entry("auto", "auto: the run's newest whole checkpoint; never; or a checkpoint directory")
    workers: int | None = _entry(
        None, "data processes of one rank; else as many as the processors allow, at most 8", at_least=0
    )
    seed: int = _entry(42, "of initial weights, order, augmentation and dropout", at_least=0, below=2**63)
    track: tuple[Literal["tensorboard", "wandb"], ...] = _entry((), "where metrics go beside metrics.jsonl")
    max_bad_samples: float = _entry(0.0, "share of the training images that may be unreadable", at_least=0, below=1)
    loss: Literal["softmax", "bce"] = _entry(
        "softmax", "softmax: one class an image; bce: each class by itself, any number of them an image"
    )
    class_weights: str | tuple[float, ...] | None = _entry(
        None, "auto: inverse to the class counts; or a JSON file, a list of weights or {class: weight}"
    )
    label_smoothing: float = _entry(0.0, "share of the target spread over all classes", at_least=0, below=1)
    weight_decay_on: Literal["matrices", "all"] = _entry("all", "all parameters (as DeepSpeed), or matrices only")
    layer_decay: float = _entry(
        1.0, "learning rate of each block as a share of that of the block behind it, 1 is off", above=0, at_most=1
    )
    ema_decay: float = _entry(
        0.0, "of a moving average of the weights, per applied step, 0 is off", at_least=0, below=1
    )
    extend_to: int | None = _entry(
        None, "go on with a run to this many steps, its schedule computed anew from here", at_least=1
    )
    keep_every: int | None = _entry(None, "steps between checkpoints that are kept for good", at_least=1)
    save_in_background: bool = _entry(True, "copy the state and train on while it is written; else wait for it")
    max_skipped_in_a_row: int | None = _entry(
        None, "steps in a row without an update that end the run; else 10, in float16 50", at_least=1
    )
    on_divergence: Literal["stop", "rewind"] = _entry(
        "stop", "stop: end the run; rewind: go back to the last checkpoint and leave out the batches at fault"
    )
    max_rewinds: int = _entry(3, "of one run", at_least=1)
    hang_timeout_s: float = _entry(
        60.0,
        "seconds of silence or standstill of a rank that end the run; a phase that took long may again",
        at_least=5,
    )
    worker_timeout_s: float = _entry(60.0, "seconds that a rank waits for one batch of its data processes", at_least=5)
    data: DataConfig = field(default_factory=DataConfig)


@functools.cache
def entries(config: type = RunConfig, prefix: str = "") -> dict[str, tuple[Kind, dataclasses.Field]]:
    """Every entry by dotted key, with its kind and its field (the place of its default, help and range)."""
    kinds = typing.get_type_hints(config)
    found: dict[str, tuple[Kind, dataclasses.Field]] = {}
    for one in dataclasses.fields(config):
        if dataclasses.is_dataclass(kinds[one.name]):
            found |= entries(kinds[one.name], f"{prefix}{one.name}.")
        else:
            found[prefix + one.name] = (kinds[one.name], one)
    return found


def check_entry(key: str, value: Any) -> Any:
    """Check one value of the section (dotted key, without "vitds.") against its kind and range, and return it fitted.

    Raises: ValueError that says what was expected and what was seen.
    """
    kind, one = entries()[key]
    value = check_value(value, kind)
    for number in value if isinstance(value, tuple) else (value,):
        for word, bound in one.metadata["bounds"].items():
            if isinstance(number, int | float) and not _BOUNDS[word](number, bound):
                raise ValueError(f"must be {word.replace('_', ' ')} {bound}, not {show(value)}")
    if key in ("data.crop_scale", "data.crop_ratio") and value[0] > value[1]:
        raise ValueError(f"must be [lowest, highest], not {show(value)}")
    if key in ("data.mean", "data.std") and isinstance(value, tuple) and len(value) not in (1, 3):
        raise ValueError(f"must be one number or three, not {show(value)}")
    if key == "train" and not re.fullmatch(r"all|head|last-[1-9]\d*", value):
        raise ValueError(f"must be all, head, or last-K such as last-2, not {show(value)}")
    if key == "profile" and value is not None and not re.fullmatch(r"[1-9]\d*:[1-9]\d*", value):
        raise ValueError(f"must be STEP:COUNT such as 100:5, steps 100 to 104, not {show(value)}")
    if key == "name" and value is not None and (not value or "/" in value or value in (".", "..")):
        raise ValueError(f"must be a plain directory name, not {show(value)}; the place is --output-dir")
    return value


def run_config(document: Document) -> RunConfig:
    """Read the "vitds" section of a document.

    Raises: ConfigError at the first unknown key or unfit value, with its flag or line.
    """
    section = document.get("vitds", {})
    if not isinstance(section, dict):
        raise ConfigError('"vitds" must be a section, {...}', where=document.where("vitds"))
    values: dict[str, Any] = {}
    for key, value in _leaves(section):
        where = document.where(f"vitds.{key}")
        if key not in entries():
            names = {**entries(), "data": None}
            raise ConfigError(f'unknown key "vitds.{key}"', where=where, fix=did_you_mean(key, names))
        try:
            values[key] = check_entry(key, value)
        except ValueError as error:
            raise ConfigError(f'"vitds.{key}" {error}', where=where) from None
    data = {key.removeprefix("data."): values.pop(key) for key in list(values) if key.startswith("data.")}
    return RunConfig(**values, data=DataConfig(**data))


def _leaves(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if name == "data" and not prefix and isinstance(value, dict):
            yield from _leaves(value, "data.")
        else:
            yield prefix + name, value
