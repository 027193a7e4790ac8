"""DeepSpeed's half of an experiment: which keys there are, what contradicts what, and what "auto" stands for.

DeepSpeed ignores a misspelt top-level key without a word, so the key table (ds_keys.py) is ours. The order of this page
is the order of work: `check_keys` refuses what DeepSpeed does not know, `check_combinations` what it would get wrong,
`optimizer_plan` and `schedule_plan` say what vitds builds itself, `solve_batch` fixes the batch sizes, and
`deepspeed_dict` writes what `deepspeed.initialize` is given.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from vitds.document import Document, Kind, check_value, describe, show
from vitds.ds_keys import (
    AUTO_EXAMPLES,
    AUTO_KEYS,
    BATCH_KEYS,
    BUILT_HERE,
    DEEPSPEED_KEYS,
    MAY_BE_NEGATIVE,
    NO_EFFECT,
    OPTIMIZERS,
    REFUSED,
    SCHEDULERS,
    STAGE_3,
    STAGES_1_AND_2,
    VITDS_SCHEDULERS,
    Table,
)
from vitds.errors import ConfigError, did_you_mean, nearest


@dataclass(frozen=True)
class OptimizerPlan:
    """An optimizer that vitds builds: torch's name, and every parameter written out."""

    type: Literal["AdamW", "Adam", "SGD"]
    params: dict[str, Any]


@dataclass(frozen=True)
class SchedulePlan:
    """A schedule that vitds builds: linear warmup from 0, then the decay to 0 at total_steps (constant: none)."""

    type: Literal["linear", "cosine", "constant"]
    warmup_steps: int
    total_steps: int


@dataclass(frozen=True)
class Batch:
    """The batch triangle, solved: global_batch == micro_batch * accumulation_steps * world_size, in images."""

    global_batch: int
    micro_batch: int
    accumulation_steps: int
    world_size: int


def kind_of(key: str) -> Kind:
    """The kind of a DeepSpeed key, for a value given on the command line.

    Raises: ConfigError naming the nearest key when there is none of that name.
    """
    if key in REFUSED or key.split(".")[0] in REFUSED:
        return Any  # check_keys says why
    table: Any = DEEPSPEED_KEYS
    for name, tables in (("optimizer.params.", OPTIMIZERS), ("scheduler.params.", SCHEDULERS)):
        if key.startswith(name):
            table, key = {}, key.removeprefix(name)
            for params in tables.values():
                table |= params
    for depth, part in enumerate(key.split(".")):
        if not isinstance(table, dict) or part not in table:
            names = table if isinstance(table, dict) else ()
            raise ConfigError(f'unknown key "{key}"', fix=did_you_mean(part, names) if depth or names else "")
        table = table[part]
    return dict if isinstance(table, dict) else table


def check_keys(document: Document) -> None:
    """Refuse what DeepSpeed does not know, what vitds does not do, and values of the wrong type; fit the others.

    Raises: ConfigError with file and line, or flag; of values "auto" that follow from nothing, for all together.
    """
    autos: list[tuple[str, Kind]] = []
    _check_section(document, document.values, DEEPSPEED_KEYS, "", autos)
    for section, types in (("optimizer", OPTIMIZERS), ("scheduler", SCHEDULERS)):
        if document.get(section, "auto") != "auto":
            name, params = _type_of(document, section, types), document.get(f"{section}.params", {})
            if params != "auto":
                _check_section(document, params, types[name], f"{section}.params.", autos)
    _refuse_autos(document, autos)


def _type_of(document: Document, section: str, types: dict[str, Table]) -> str:
    """The type of the optimizer or scheduler section as the tables spell it."""
    name, where = document.get(f"{section}.type"), document.where(f"{section}.type")
    if name is None:
        raise ConfigError(f'"{section}" has no "type"', where=document.where(section), fix="one of " + ", ".join(types))
    spelt = nearest(name, types)
    if spelt is None or spelt.lower() != name.lower():
        raise ConfigError(f'unknown {section} "{name}"', where=where, fix=did_you_mean(name, types))
    document.values[section]["type"] = spelt
    return spelt


def _check_section(
    document: Document, section: dict[str, Any], table: Table, prefix: str, autos: list[tuple[str, Kind]]
) -> None:
    """`autos` is given the keys, with their kinds, whose "auto" follows from nothing."""
    for name, value in section.items():
        key = prefix + name
        where = document.where(key)
        if key in REFUSED:
            raise ConfigError(
                f'"{key}" cannot be used: {REFUSED[key]}', where=where, fix="take it out of the configuration"
            )
        if name not in table:
            raise ConfigError(f'unknown key "{key}"', where=where, fix=_unknown_key_fix(name, table, prefix))
        kind = table[name]
        if value == "auto":
            if not _is_filled(key, kind):
                autos.append((key, kind))
        elif isinstance(kind, dict):
            if key == "zero_optimization.leaf_module" and value is None:
                continue
            if not isinstance(value, dict):
                if value is None and key.startswith("zero_optimization.offload"):
                    continue
                raise ConfigError(f'"{key}" must be a section, {{...}}, not {show(value)}', where=where)
            _check_section(document, value, kind, key + ".", autos)
        else:
            section[name] = _checked(key, value, kind, where)


def _checked(key: str, value: Any, kind: Kind, where: str) -> Any:
    try:
        value = check_value(value, kind)
    except ValueError as error:
        raise ConfigError(f'"{key}" {error}', where=where) from None
    numbers = value if isinstance(value, tuple | list) else [value]
    if key not in MAY_BE_NEGATIVE and any(isinstance(n, int | float) and n < 0 for n in numbers):
        raise ConfigError(f'"{key}" must not be negative: {show(value)}', where=where)
    if key.endswith(".betas") and any(n >= 1 for n in numbers):
        raise ConfigError(f'"{key}" must be below 1: {show(value)}', where=where)
    return value


def _unknown_key_fix(name: str, table: Table, prefix: str) -> str:
    if name == "max_grad_norm":
        return 'write "gradient_clipping" at the top level instead'
    near = nearest(name, table)
    head = f'did you mean "{near}"?' if near else "valid names: " + ", ".join(table)
    silent = prefix.split(".")[0] in ("", "activation_checkpointing", "checkpoint")
    consequence = f" and run without {near.replace('_', ' ')}" if near and not prefix else ""
    return head + (f"  DeepSpeed would have ignored it{consequence}." if silent else "")


def _is_filled(key: str, kind: Kind) -> bool:
    """Whether "auto" follows from something else there."""
    return key in AUTO_KEYS or (key.startswith("zero_optimization.") and kind is int) or kind is str


def _refuse_autos(document: Document, autos: list[tuple[str, Kind]]) -> None:
    """Raises: ConfigError that names every one, for a file of Hugging Face's has several."""
    if not autos:
        return
    values = [AUTO_EXAMPLES.get(key, "true or false" if kind is bool else describe(kind)) for key, kind in autos]
    lines = [f'{document.where(key)}  "{key}": {value}' for (key, _), value in zip(autos, values, strict=True)]
    raise ConfigError(
        ", ".join(f'"{key}"' for key, _ in autos) + ': "auto" follows from nothing',
        where=document.where(autos[0][0]),
        fix=f"write its value: {values[0]}" if len(autos) == 1 else "\n".join(["write their values:", *lines]),
    )


def fill_defaults(document: Document) -> None:
    """Write the recipe that stands where the file has no optimizer or scheduler.

    Source: "An Image is Worth 16x16 Words", fine-tuning: SGD, momentum 0.9, no weight decay, cosine, clipping at 1.
    """
    document.values.setdefault(
        "optimizer", {"type": "SGD", "params": {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.0}}
    )
    document.values.setdefault("scheduler", {"type": "cosine"})
    document.values.setdefault("gradient_clipping", 1.0)  # DeepSpeed 0.19.8's own default, written out


def optimizer_plan(document: Document) -> OptimizerPlan | None:
    """The optimizer of a checked document, None when DeepSpeed builds it.

    DeepSpeed's meaning is kept: its Adam is AdamW unless "adam_w_mode" is false, and decays nothing unless told to,
    except that "torch_adam" brings torch's AdamW default of 0.01.

    Raises: ConfigError for bias_correction false, which torch does not have.
    """
    name, params = document.get("optimizer.type"), dict(document.get("optimizer.params", {}))
    if name not in BUILT_HERE or keeps_fp16_masters(document):
        return None
    for ignored in ("foreach", "fused", "set_grad_none", "fp32_optimizer_states"):
        params.pop(ignored, None)
    if name == "SGD":
        return OptimizerPlan("SGD", {"lr": 1e-3, "momentum": 0.0, "weight_decay": 0.0} | params)
    key = "optimizer.params.bias_correction"
    if not params.pop("bias_correction", True):
        raise ConfigError(
            f'"{key}" cannot be false: torch\'s Adam always corrects', where=document.where(key), fix="take it out"
        )
    decoupled = params.pop("adam_w_mode", True) or name == "AdamW"
    weight_decay = 0.01 if params.pop("torch_adam", False) and decoupled else 0.0
    defaults = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": weight_decay}
    return OptimizerPlan("AdamW" if decoupled else "Adam", defaults | params)


def schedule_plan(document: Document, num_steps: int) -> SchedulePlan | None:
    """The schedule of a checked document whose "auto" is resolved, None when it is one of DeepSpeed's.

    Raises: ConfigError when the warmup is longer than the schedule.
    """
    name = document.get("scheduler.type")
    if name not in VITDS_SCHEDULERS:
        return None
    warmup = document.get("scheduler.params.warmup_num_steps", 0)
    if warmup > num_steps:
        where = document.where("scheduler.params.warmup_num_steps")
        raise ConfigError(
            f"{warmup} warmup steps are more than the run's {num_steps}",
            where=where,
            fix="--warmup-steps N, --num-steps N",
        )
    return SchedulePlan(name, warmup, num_steps)


def resolve_schedule(document: Document, num_steps: int) -> list[str]:
    """Write what follows from the run's length into the scheduler section; return warnings on DeepSpeed's schedulers.

    Raises: ConfigError when the file gives two lengths.
    """
    name = document.get("scheduler.type")
    params = document.values["scheduler"].setdefault("params", {})
    total, where = params.get("total_num_steps"), document.where("scheduler.params.total_num_steps")
    is_extended = document.get("vitds.extend_to") is not None
    length_from_flag = is_extended or {"vitds.num_steps", "vitds.epochs"} & document.flags.keys()
    if "total_num_steps" in SCHEDULERS[name] and (
        total in (None, "auto") or (name in VITDS_SCHEDULERS and length_from_flag)
    ):
        params["total_num_steps"] = total = num_steps
    lr = document.get("optimizer.params.lr", 1e-3)
    for key, value in (("warmup_max_lr", lr), ("warmup_min_lr", 0.0)):
        if params.get(key) == "auto":
            params[key] = value
    if name in VITDS_SCHEDULERS:
        if total != num_steps:
            what = f"the schedule is {total} steps long and the run {num_steps}"
            raise ConfigError(what, where=where, fix='write "total_num_steps": "auto"; --stop-at-step ends a run early')
        return []
    warnings = [f"scheduler {name} is DeepSpeed's own; vitds' linear, cosine and constant are exact"]
    if name.startswith("Warmup"):
        kind = params.get("warmup_type", "log")
        warnings = [f"scheduler {name} is DeepSpeed's own: two steps at its lowest rate, {kind} warmup"]
    if total not in (None, num_steps):
        warnings.append(f"scheduler {name} ends at step {total}, the run at {num_steps}")
    peak = params.get("warmup_max_lr", 0.001)
    if name == "WarmupDecayLR" and peak not in (None, lr):  # null stands for the optimizer's
        warnings.append(f"scheduler {name} rises to warmup_max_lr {peak}, not to the optimizer's lr {lr}")
    return warnings


def zero_stage(document: Document) -> int:
    """The ZeRO stage of a checked document."""
    return document.get("zero_optimization.stage", 0)


def dtype(document: Document) -> Literal["fp32", "bf16", "fp16"]:
    """The precision of the model's parameters in a checked document."""
    if document.get("fp16.enabled"):
        return "fp16"
    return "bf16" if document.get("bf16.enabled") else "fp32"


def is_float16_autocast(section: dict[str, Any]) -> bool:
    """Whether a "torch_autocast" section asks for float16, which vitds does in place of DeepSpeed."""
    name = str(section.get("dtype", "")).removeprefix("torch.")
    return bool(section.get("enabled")) and name in ("float16", "fp16", "half")


def describe_precision(ds: dict[str, Any], parameters: str) -> str:
    """The precision of a run whose `parameters` are fp32, bf16 or fp16, for people."""
    autocast = ds.get("torch_autocast", {})
    if not autocast.get("enabled"):
        return parameters
    return f"{parameters} under {'float16' if is_float16_autocast(autocast) else 'bfloat16'} autocast"


def keeps_fp16_masters(document: Document) -> bool:
    """True when masters in 16 bits are asked for and DeepSpeed has them: of its own CPU Adam alone."""
    is_adam = document.get("optimizer.type") in ("Adam", "AdamW") and not document.get("optimizer.params.torch_adam")
    asked = document.get("fp16.enabled") and document.get("fp16.fp16_master_weights_and_grads")
    return bool(asked) and is_adam and offloads_optimizer(document)


def offloads_optimizer(document: Document) -> bool:
    """True when optimizer states live in host memory or on NVMe."""
    device = document.get("zero_optimization.offload_optimizer.device", "none")
    return device != "none" or bool(document.get("zero_optimization.cpu_offload"))


def check_combinations(document: Document) -> None:
    """Refuse what DeepSpeed would train wrongly or crash on.

    Raises: ConfigError naming both sides of the contradiction.
    """
    for refused, key, what, fix in _contradictions(document):
        if refused:
            raise ConfigError(what, where=document.where(key), fix=fix)


def _contradictions(document: Document) -> Iterator[tuple[bool, str, str, str]]:
    """Every rule as (is it broken?, the key to point at, what is wrong, what to do)."""
    stage, precision, get = zero_stage(document), dtype(document), document.get
    sixteen_bit = precision != "fp32"
    both = get("fp16.enabled", False) and get("bf16.enabled", False)
    yield both, "fp16.enabled", "fp16 and bf16 are both enabled", "keep one of them"
    autocast = get("torch_autocast.enabled", False)
    yield (
        autocast and sixteen_bit,
        "torch_autocast.enabled",
        f"torch_autocast and {precision} are both enabled: DeepSpeed would run plain {precision}",
        "keep one of them",
    )
    yield (
        is_float16_autocast(get("torch_autocast", {})) and stage == 0,
        "torch_autocast.dtype",
        "torch_autocast in float16 at ZeRO stage 0: its loss scale lives in the optimizer of ZeRO",
        'use stage 1: "zero_optimization": {"stage": 1}, on one device too',
    )
    yield (
        sixteen_bit and stage == 0,
        f"{precision}.enabled",
        f"{precision} at ZeRO stage 0: DeepSpeed's first optimizer step is wrong there",
        'use stage 1: "zero_optimization": {"stage": 1}, on one device too',
    )
    master = get("bf16.bf16_master_weights_and_grads", False)
    yield (
        master and not get("bf16.bf16_optimizer_states"),
        "bf16.bf16_master_weights_and_grads",
        "bf16 master weights need DeepSpeed's own CPU Adam, or bf16 optimizer states",
        'take it out, or add "bf16_optimizer_states": true',
    )
    yield (
        offloads_optimizer(document) and stage == 0,
        "zero_optimization",
        "the optimizer is offloaded, but ZeRO is off",
        'use "stage": 1, 2 or 3',
    )
    scheduler, peak = get("scheduler.type"), get("scheduler.params.warmup_max_lr")
    yield (
        get("vitds.layer_decay", 1.0) < 1
        and (
            scheduler in ("WarmupDecayLR", "OneCycle", "LRRangeTest") or (scheduler == "WarmupLR" and peak is not None)
        ),
        "scheduler.type",
        f"DeepSpeed's {scheduler} would give every layer the same learning rate, against layer_decay",
        'use vitds\' "linear", "cosine" or "constant"',
    )
    offload = "zero_optimization.offload_optimizer"
    yield (
        get("vitds.ema_decay", 0.0) > 0
        and (
            master
            or keeps_fp16_masters(document)
            or get(f"{offload}.device") == "nvme"
            or get(f"{offload}.ratio", 1.0) < 1
        ),
        "vitds.ema_decay",
        "an average of the weights needs fp32 masters in the memory of one device",
        'take out "bf16_master_weights_and_grads" or its namesake of fp16, the "nvme" device and the "ratio" of '
        '"offload_optimizer"',
    )
    yield (
        get("gradient_allreduce_op") == "sum" and stage == 3,
        "gradient_allreduce_op",
        '"sum" does not exist at ZeRO stage 3',
        'use "mean"',
    )
    yield (
        get("prescale_gradients", False) and stage >= 2 and get("zero_optimization.reduce_scatter", True),
        "prescale_gradients",
        f"gradients cannot be prescaled at ZeRO stage {stage} with reduce_scatter",
        'take it out, or set "reduce_scatter": false',
    )
    is_muon = get("optimizer.type") == "Muon"
    yield (
        is_muon and stage == 3 and get("zero_optimization.reduce_scatter", True),
        "optimizer.type",
        "Muon does not work with reduce_scatter at ZeRO stage 3",
        'set "reduce_scatter": false, or use stage 2',
    )
    yield (
        is_muon and stage == 1 and precision == "bf16",
        "optimizer.type",
        "Muon at ZeRO stage 1 in bf16: DeepSpeed takes matrices alone there, and no position embeddings",
        "use stage 2",
    )
    yield (
        get("managed_gradient_accumulation", True) is False,
        "managed_gradient_accumulation",
        "vitds leaves the accumulation boundary to DeepSpeed",
        "take it out of the configuration",
    )
    yield (
        bool(get("checkpoint.load_universal") or get("checkpoint.use_node_local_storage")),
        "checkpoint",
        "universal and node-local checkpoints are not vitds' committed ones",
        "take the section out; --resume and --pretrained choose what is loaded",
    )
    yield (
        get("zero_optimization.compute_grad_norm", True) is False,
        "zero_optimization.compute_grad_norm",
        "vitds logs the gradient norm of every step",
        "take it out of the configuration",
    )
    yield (
        get("bf16.check_grad_overflow", True) is False,
        "bf16.check_grad_overflow",
        "vitds updates nothing with gradients that are not finite",
        "take it out of the configuration",
    )
    yield (
        get("optimizer.type") == "Adagrad" and stage > 0,
        "optimizer.type",
        f"Adagrad at ZeRO stage {stage}: DeepSpeed puts another in its place, which knows neither schedule nor groups",
        "use stage 0 in fp32, or another optimizer",
    )
    yield (
        get(f"{offload}.device") == "nvme",
        f"{offload}.device",
        "optimizer state on NVMe cannot be saved"
        if stage == 3
        else f"at ZeRO stage {stage} DeepSpeed keeps the optimizer in host memory, and nothing on NVMe",
        'offload it to the CPU: "device": "cpu"',
    )
    yield (
        get(f"{offload}.ratio", 1.0) < 1
        and stage == 3
        and offloads_optimizer(document)
        and not keeps_fp16_masters(document),
        f"{offload}.ratio",
        "a share of the optimizer can be offloaded only with DeepSpeed's own CPU Adam, which vitds does not use here",
        'take out "ratio"',
    )
    predivide = get("gradient_predivide_factor", 1.0)
    yield predivide == 0, "gradient_predivide_factor", "gradients cannot be divided by 0", "take it out"
    yield (
        predivide != 1 and stage >= 2 and get("zero_optimization.reduce_scatter", True),
        "gradient_predivide_factor",
        f"gradients cannot be divided beforehand at ZeRO stage {stage} with reduce_scatter",
        'take it out, or set "reduce_scatter": false',
    )
    yield (
        get("steps_per_print") == 0,
        "steps_per_print",
        "DeepSpeed divides by it",
        "take it out: vitds prints its own lines (--log-every N)",
    )
    yield (
        bool(get("bf16.bf16_optimizer_states")) and not master,
        "bf16.bf16_optimizer_states",
        "bf16 optimizer states go with bf16 master weights",
        'take it out, or add "bf16_master_weights_and_grads": true',
    )
    yield (
        get("data_types.param_dtype") not in (None, precision),
        "data_types.param_dtype",
        f"param_dtype {get('data_types.param_dtype')} in a run in {precision}",
        'take it out: the "bf16" and "fp16" sections choose the precision',
    )
    yield (
        get("scheduler.params.warmup_num_steps") == 0 and get("scheduler.type", "linear") not in VITDS_SCHEDULERS,
        "scheduler.params.warmup_num_steps",
        f"{get('scheduler.type')} refuses 0 warmup steps",
        "write 1 or more, or use vitds' own linear, cosine or constant",
    )


def without_effect(document: Document) -> list[str]:
    """A warning for every known key that changes nothing here, with its reason."""
    stage = zero_stage(document)
    found = [f'"{key}" has no effect: {why}' for key, why in NO_EFFECT.items() if document.get(key)]
    for table, idle, why in (
        (STAGE_3, stage < 3, "belong to stage 3"),
        (STAGES_1_AND_2, stage == 3, "belong to stages 1 and 2"),
    ):
        names = [name for name in document.get("zero_optimization", {}) if name in table]
        if idle and names:
            found.append(f"zero_optimization at stage {stage}: {', '.join(names)} {why} and have no effect")
    autocast = document.get("torch_autocast", {})
    if is_float16_autocast(autocast) and autocast.get("lower_precision_safe_modules"):
        found.append('"torch_autocast.lower_precision_safe_modules" has no effect: gradients are reduced in fp32')
    if document.get("fp16.fp16_master_weights_and_grads") and not keeps_fp16_masters(document):
        found.append(
            '"fp16.fp16_master_weights_and_grads" has no effect, the masters stay fp32: DeepSpeed keeps 16-bit ones'
            ' for its own CPU Adam alone, "optimizer" Adam or AdamW with "offload_optimizer": {"device": "cpu"}'
        )
    return found


def about_precision(document: Document) -> list[str]:
    """A warning for what 16 bits lose."""
    if not keeps_fp16_masters(document):
        return []
    return ["masters in 16 bits: an update below about 1/2000 of its weight is lost; fp32 masters are the default"]


def solve_batch(document: Document, world_size: int) -> Batch:
    """Complete the batch triangle as DeepSpeed does; two flags replace the file's third value.

    Raises: ConfigError with complete, consistent choices when the numbers do not multiply out.
    """
    given = {key: document.get(key) for key in BATCH_KEYS if document.get(key) not in (None, "auto")}
    from_flags = {key: value for key, value in given.items() if key in document.flags}
    if len(from_flags) == 2:
        given = from_flags
    key = next(iter(from_flags or given), "train_batch_size")
    for name, value in given.items():
        if value < 1:
            raise ConfigError(f'"{name}" must be at least 1, not {value}', where=document.where(name))
    if not given.keys() - {"gradient_accumulation_steps"}:
        raise ConfigError(
            "no batch size is given", where=document.where(key), fix="add --train-batch-size N (images of all ranks)"
        )
    total, micro, accumulation = (given.get(name) for name in BATCH_KEYS)
    batch = _complete(total, micro, accumulation, world_size)
    if batch is None:
        seen = ", ".join(f"{name} {value} ({document.where(name)})" for name, value in given.items())
        raise ConfigError(
            f"batch sizes do not multiply out on {_ranks(world_size)}: {seen}",
            where=document.where(key),
            fix="train_batch_size = train_micro_batch_size_per_gpu * gradient_accumulation_steps * ranks; choose one:\n"
            + "\n".join(_flag_line(choice) for choice in consistent_batches(given, world_size)),
        )
    return batch


def keep_global_batch(saved: Batch, world_size: int, unit: int = 1) -> Batch:
    """The same global batch on other ranks: the largest micro-batch, of whole `unit`s, that was known to fit in memory.

    Raises: ConfigError when these ranks cannot share it, with the numbers of ranks that can.
    """
    for micro in range(saved.micro_batch, 0, -1):
        if micro % unit == 0 and saved.global_batch % (micro * world_size) == 0:
            return Batch(saved.global_batch, micro, saved.global_batch // (micro * world_size), world_size)
    fitting = [str(ranks) for ranks in range(1, 65) if saved.global_batch % (unit * ranks) == 0]
    raise ConfigError(
        f"{_ranks(world_size)} cannot share the run's global batch of {saved.global_batch}",
        fix=f"go on with {' '.join(fitting)} ranks",
    )


def _ranks(world_size: int) -> str:
    return f"{world_size} rank" + ("s" if world_size > 1 else "")


def _flag_line(batch: Batch) -> str:
    sizes = (batch.global_batch, batch.micro_batch, batch.accumulation_steps)
    return "  " + " ".join(f"{flag} {size}" for flag, size in zip(BATCH_KEYS.values(), sizes, strict=True))


def _complete(total: int | None, micro: int | None, accumulation: int | None, world_size: int) -> Batch | None:
    """The triangle from any subset; None when it is not whole, contradicts itself, or holds no batch size."""
    if total is None and micro is not None:
        accumulation = accumulation or 1
        total = micro * accumulation * world_size
    elif total is not None and micro is None:
        accumulation = accumulation or 1
        micro = total // (accumulation * world_size)
    elif total is not None and micro is not None and accumulation is None:
        accumulation = total // (micro * world_size)
    if not total or not micro or not accumulation or total != micro * accumulation * world_size:
        return None
    return Batch(total, micro, accumulation, world_size)


def consistent_batches(given: dict[str, int], world_size: int, num_choices: int = 3) -> list[Batch]:
    """Complete triangles near the given numbers: each keeps as many of them as can be kept, the global batch first."""
    total, micro, accumulation = (given.get(name) for name in BATCH_KEYS)
    tries = [(total, micro, None), (total, None, accumulation), (total, None, None)]
    if micro and accumulation:
        tries.append((None, micro, accumulation))
    unit = world_size * (micro or accumulation or 1)
    below = max(1, (total or unit) // unit)
    for multiple in range(below, below + num_choices):
        tries.append((multiple * unit, micro, None if micro else accumulation))
    found = [_complete(*sizes, world_size) for sizes in tries]
    return list(dict.fromkeys(batch for batch in found if batch))[:num_choices]


def deepspeed_dict(
    document: Document, batch: Batch, *, optimizer_type: str | None, own_schedule: bool, num_parameters: int
) -> dict[str, Any]:
    """What `deepspeed.initialize` is given: explicit, without "vitds", "auto", or the sections that vitds builds.

    `optimizer_type` is the one that vitds builds, None where DeepSpeed builds it; `own_schedule` likewise.
    `num_parameters` are the model's, more than which no bucket of gradients has to hold.
    """
    ds = copy.deepcopy(
        {key: value for key, value in document.values.items() if key not in ("vitds", "activation_checkpointing")}
    )
    ds.update(
        train_batch_size=batch.global_batch,
        train_micro_batch_size_per_gpu=batch.micro_batch,
        gradient_accumulation_steps=batch.accumulation_steps,
    )
    if optimizer_type is not None:
        ds.pop("optimizer", None)
    if own_schedule:
        ds.pop("scheduler", None)
    zero = ds.setdefault("zero_optimization", {})
    ds["zero_optimization"] = {key: value for key, value in zero.items() if value != "auto"}
    ds["zero_optimization"].setdefault("stage", 0)
    if zero_stage(document):
        ds["zero_optimization"].setdefault("reduce_bucket_size", min(num_parameters, _REDUCE_BUCKET_SIZE))
    ds.setdefault("steps_per_print", _NEVER)
    if dtype(document) == "bf16" and not document.get("bf16.bf16_master_weights_and_grads"):
        types = ds.setdefault("data_types", {})
        types["grad_accum_dtype"] = types.get("grad_accum_dtype") or "fp32"
    if not keeps_fp16_masters(document):
        ds.get("fp16", {}).pop("fp16_master_weights_and_grads", None)
    if zero_stage(document) > 0 and optimizer_type not in ("AdamW", "Adam"):
        ds.setdefault("zero_allow_untested_optimizer", True)
    if offloads_optimizer(document):
        ds.setdefault("zero_force_ds_cpu_optimizer", False)
    return ds


_REDUCE_BUCKET_SIZE = 500_000_000  # DeepSpeed's default: elements that it allocates, whatever the model
_NEVER = 10**12  # DeepSpeed's line every so many steps; vitds prints its own
