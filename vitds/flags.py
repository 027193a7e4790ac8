"""The command line: one table of flags, each an edit of one key of the configuration; `--set` edits every other key."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vitds.document import Document, Kind, parse_value
from vitds.ds_config import kind_of as deepspeed_kind_of
from vitds.ds_keys import BATCH_KEYS, DEEPSPEED_KEYS, REFUSED, VITDS_SCHEDULERS
from vitds.errors import ConfigError, UsageError, did_you_mean, nearest
from vitds.run_config import check_entry, entries


@dataclass(frozen=True)
class Flag:
    """One flag: its name, the dotted key it sets, and how --help shows it (keys of vitds bring their own help)."""

    name: str
    key: str
    metavar: str
    group: str
    help: str = ""


_RUN, _MODEL, _BATCH, _LENGTH, _SAVE, _MACHINE = (
    "what to train, on what",
    "the model",
    "batch sizes",
    "length and learning rate",
    "evaluation, logs and checkpoints",
    "the machine, and everything else",
)
FLAGS: dict[str, Flag] = {
    flag.name: flag
    for flag in (
        Flag(
            "--deepspeed_config", "", "FILE", _RUN, "the experiment: DeepSpeed's JSON with a vitds section (required)"
        ),
        Flag("--data", "vitds.data.path", "DIR|URL", _RUN),
        Flag("--name", "vitds.name", "RUN", _RUN),
        Flag("--output-dir", "vitds.output_dir", "DIR", _RUN),
        Flag("--pretrained", "vitds.pretrained", "PATH", _RUN),
        Flag("--sampling", "vitds.data.sampling", "natural|balanced", _RUN),
        Flag("--samples-per-epoch", "vitds.data.samples_per_epoch", "N", _RUN),
        Flag("--allow-pipe", "vitds.data.allow_pipe", "", _RUN),
        Flag("--loss", "vitds.loss", "softmax|bce", _RUN),
        Flag("--label-smoothing", "vitds.label_smoothing", "SHARE", _RUN),
        Flag("--class-weights", "vitds.class_weights", "auto|FILE", _RUN),
        Flag("--train", "vitds.train", "all|head|last-K", _RUN),
        Flag("--model", "vitds.model", "NAME", _MODEL),
        Flag("--image-size", "vitds.image_size", "S|HxW", _MODEL),
        Flag("--num-classes", "vitds.num_classes", "N", _MODEL),
        Flag("--activation-checkpointing", "vitds.activation_checkpointing", "none|selective|full|auto|K", _MODEL),
        Flag("--compile", "vitds.compile", "true|MODE", _MODEL),
        Flag("--train-batch-size", "train_batch_size", "N", _BATCH, "images of one global step, over all ranks"),
        Flag("--micro-batch-size", "train_micro_batch_size_per_gpu", "N", _BATCH, "images of one rank's forward pass"),
        Flag(
            "--gradient-accumulation-steps",
            "gradient_accumulation_steps",
            "N",
            _BATCH,
            "forward passes of one global step",
        ),
        Flag("--auto-micro-batch", "vitds.auto_micro_batch", "", _BATCH),
        Flag("--eval-batch-size", "vitds.eval_batch_size", "N", _BATCH),
        Flag("--num-steps", "vitds.num_steps", "N", _LENGTH),
        Flag("--epochs", "vitds.epochs", "N", _LENGTH),
        Flag("--stop-at-step", "vitds.stop_at_step", "N", _LENGTH),
        Flag("--warmup-steps", "scheduler.params.warmup_num_steps", "N", _LENGTH, "steps of linear warmup (default 0)"),
        Flag(
            "--decay-type",
            "scheduler.type",
            "|".join(VITDS_SCHEDULERS),
            _LENGTH,
            "after the warmup (default cosine)",
        ),
        Flag("--layer-decay", "vitds.layer_decay", "SHARE", _LENGTH),
        Flag("--ema-decay", "vitds.ema_decay", "SHARE", _LENGTH),
        Flag("--extend-to", "vitds.extend_to", "N", _LENGTH),
        Flag("--eval-every", "vitds.eval_every", "N", _SAVE),
        Flag("--save-every", "vitds.save_every", "N", _SAVE),
        Flag("--log-every", "vitds.log_every", "N", _SAVE),
        Flag("--profile", "vitds.profile", "STEP:COUNT", _SAVE),
        Flag("--keep-last", "vitds.keep_last", "K", _SAVE),
        Flag("--keep-every", "vitds.keep_every", "N", _SAVE),
        Flag("--resume", "vitds.resume", "auto|never|PATH", _SAVE),
        Flag("--workers", "vitds.workers", "N", _MACHINE),
        Flag("--seed", "vitds.seed", "N", _MACHINE),
        Flag("--max-bad-samples", "vitds.max_bad_samples", "SHARE", _MACHINE),
        Flag(
            "--set",
            "",
            "KEY=VALUE",
            _MACHINE,
            "any other key, as data.mixup_alpha=0.2 or optimizer.params.lr=0.01; repeatable",
        ),
        Flag("--deepspeed", "", "", _MACHINE, "accepted, as the launcher's scripts pass it; always on"),
        Flag("--local_rank", "", "N", _MACHINE, "accepted, as the launcher passes it; not needed"),
    )
}
_BY_CANONICAL_NAME = {name.replace("_", "-"): flag for name, flag in FLAGS.items()}

EXAMPLES = """\
  deepspeed launch/train.py --deepspeed_config ds_configs/quickstart.json --data data/digits --name digits
  deepspeed launch/train.py --deepspeed_config ds_configs/cifar10_vit_b16_bf16.json --data data/cifar10 \\
      --pretrained ViT-B_16.npz --train-batch-size 512 --num-steps 10000 --set optimizer.params.lr=0.01
  deepspeed launch/train.py ... the same command again: goes on where the run stopped"""


@dataclass(frozen=True)
class Edit:
    """One value given on the command line: the key it sets and the flag as it was written."""

    key: str
    value: object
    flag: str


@dataclass(frozen=True)
class CommandLine:
    """A parsed command line: the configuration file and the edits to it."""

    config_file: str | None = None
    edits: tuple[Edit, ...] = ()


# What other trainers have flags for.
_ELSEWHERE = {
    "--lr": "here: --set optimizer.params.lr=VALUE",
    "--learning-rate": "here: --set optimizer.params.lr=VALUE",
    "--weight-decay": "here: --set optimizer.params.weight_decay=VALUE",
    "--zero-stage": "here: --set zero_optimization.stage=N",
    "--batch-size": "here: --train-batch-size N, the global batch",
    "--bf16": "here: --set bf16.enabled=true",
    "--fp16": "here: --set fp16.enabled=true",
}


def _hint(name: str) -> str:
    """What to write in place of a flag that does not exist."""
    near = nearest(name, [*FLAGS, *_ELSEWHERE])
    return _ELSEWHERE.get(near or "") or _key_hint(name) or did_you_mean(name, FLAGS)


def _key_hint(name: str) -> str | None:
    """--set for a flag that is named like a key without a flag of its own."""
    key = name.removeprefix("--").replace("-", "_")
    found = [one for one in entries() if one in (key, f"data.{key}")]
    return f"here: --set {found[0]}=VALUE" if found else None


def parse_command_line(argv: Sequence[str]) -> CommandLine:
    """Read the flags: hyphens equal underscores, nothing is abbreviated, the last of two equal flags counts.

    Raises: UsageError for a flag that does not exist or lacks its value, and for a value of the wrong type or range.
    """
    config_file, edits, tokens = None, [], list(argv)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("--"):
            raise UsageError(
                f'unexpected argument "{token}"', fix="every option is a flag, as in --data DIR; --help lists them"
            )
        name, given, text = token.partition("=")
        flag = _BY_CANONICAL_NAME.get(name.replace("_", "-"))
        if flag is None:
            hint = _hint(name.replace("_", "-"))
            raise UsageError(f"unknown flag {name}", fix=hint + "\nall flags: --help; other keys: --set KEY=VALUE")
        if flag.metavar and not given:
            if not tokens or tokens[0].startswith("--"):
                raise UsageError(f"{flag.name} needs a value", fix=f"{flag.name} {flag.metavar}")
            text = tokens.pop(0)
        if flag.name == "--deepspeed_config":
            config_file = text
        elif flag.name == "--set":
            edits.append(_edit_from_set(text))
        elif flag.key and not flag.metavar:
            edits.append(Edit(flag.key, True, flag.name))
        elif flag.key:
            kind = Literal[VITDS_SCHEDULERS] if flag.name == "--decay-type" else kind_of(flag.key)
            edits.append(Edit(flag.key, _parse(flag.key, text, kind, f"{flag.name} {text}"), flag.name))
    _refuse_both(edits, "vitds.num_steps", "vitds.epochs")
    return CommandLine(config_file, tuple(edits))


def kind_of(key: str) -> Kind:
    """The kind of any key of the configuration, vitds' or DeepSpeed's.

    Raises: ConfigError when there is no such key.
    """
    if key.startswith("vitds."):
        return entries()[key.removeprefix("vitds.")][0]
    return deepspeed_kind_of(key)


def _edit_from_set(text: str) -> Edit:
    """KEY=VALUE to an edit: the key is looked for in the vitds section first, then among DeepSpeed's."""
    key, equals, value = text.partition("=")
    flag = f"--set {key}"
    if not equals or not key:
        raise UsageError(f'--set "{text}"', fix="write --set KEY=VALUE, as in --set data.mixup_alpha=0.2")
    short = key.removeprefix("vitds.")
    if short in entries():
        key = f"vitds.{short}"
    elif key.startswith("vitds.") or key.split(".")[0] not in {*DEEPSPEED_KEYS, *REFUSED}:
        names = [*entries(), *(name for name in DEEPSPEED_KEYS if name != "vitds")]
        raise UsageError(f'unknown key "{short}"', where=flag, fix=did_you_mean(short, names))
    try:
        kind = kind_of(key)
    except ConfigError as error:
        raise UsageError(error.what, where=flag, fix=error.fix) from None
    return Edit(key, _parse(key, value, kind, flag), flag)


def _parse(key: str, text: str, kind: Kind, where: str) -> object:
    try:
        value = parse_value(text, kind) if text != "auto" or key.startswith("vitds.") else "auto"
        if key.startswith("vitds."):
            return check_entry(key.removeprefix("vitds."), value)
        minimum = 1 if key in BATCH_KEYS else 0
        if isinstance(value, int | float) and value < minimum:
            raise ValueError(f"must be at least {minimum}, not {text}")
        return value
    except ValueError as error:
        raise UsageError(str(error), where=where) from None


def _refuse_both(edits: list[Edit], *keys: str) -> None:
    given = [edit.flag for edit in edits if edit.key in keys]
    if len({edit.key for edit in edits if edit.key in keys}) > 1:
        raise UsageError(f"{' and '.join(given)} contradict each other", fix="keep one of them")


def apply_edits(document: Document, edits: Sequence[Edit]) -> None:
    """Put the command line's values into the document, where they win over the file's.

    A length from a flag replaces the file's other length, and --decay-type replaces a scheduler of DeepSpeed's.
    """
    for edit in edits:
        if edit.key in ("vitds.num_steps", "vitds.epochs"):
            document.drop("vitds.epochs" if edit.key == "vitds.num_steps" else "vitds.num_steps")
        if edit.flag == "--decay-type" and document.get("scheduler.type") not in VITDS_SCHEDULERS:
            kept = ("warmup_num_steps", "total_num_steps")  # what DeepSpeed's schedulers and ours both have
            params = {name: value for name, value in document.get("scheduler.params", {}).items() if name in kept}
            document.values["scheduler"] = {"params": params}
        document.set(edit.key, edit.value, edit.flag)


def help_text() -> str:
    """What --help prints: the flags by task, with their defaults, and three examples."""
    lines = ["usage: deepspeed launch/train.py --deepspeed_config FILE --data DIR [flags]", "", "examples:", EXAMPLES]
    for group in dict.fromkeys(flag.group for flag in FLAGS.values()):
        lines += ["", f"{group}:"]
        for flag in FLAGS.values():
            if flag.group == group:
                lines += _help_lines(f"{flag.name} {flag.metavar}", _help_of(flag))
    lines += [
        "",
        "Underscores equal hyphens. A flag wins over the file. Every key that --set reaches, with its default:",
    ]
    for key in entries():
        if not _has_flag(key):
            lines += _help_lines(key, _entry_help(key))
    return "\n".join(lines)


def _help_lines(name: str, text: str) -> list[str]:
    """Two columns; a long name has a line of its own."""
    lines = [" " * 38 + line for line in textwrap.wrap(text, 80)]
    return [f"  {name}", *lines] if len(name) > 34 else [f"  {name}".ljust(38) + lines[0].lstrip(), *lines[1:]]


def _has_flag(key: str) -> bool:
    return any(flag.key == f"vitds.{key}" for flag in FLAGS.values())


def _help_of(flag: Flag) -> str:
    return flag.help or _entry_help(flag.key.removeprefix("vitds."))


def _entry_help(key: str) -> str:
    one = entries()[key][1]
    default = list(one.default) if isinstance(one.default, tuple) else one.default
    return one.metadata["help"] + ("" if default in (None, []) else f" (default {default})")
