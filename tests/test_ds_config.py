"""The key table against DeepSpeed itself, and the rules that stand on it."""

import inspect
import json
import typing

import deepspeed  # noqa: F401
import pytest
import torch
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime import config as ds_runtime
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

from vitds import ds_config, ds_keys
from vitds.document import Document, read_document
from vitds.ds_config import Batch, OptimizerPlan, SchedulePlan
from vitds.errors import ConfigError
from vitds.flags import apply_edits, parse_command_line

MODELS = {
    "zero_optimization": DeepSpeedZeroConfig,
    "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
    "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    "zero_optimization.leaf_module": DeepSpeedZeroLeafModuleConfig,
    "fp16": DeepSpeedFP16Config,
    "bf16": DeepSpeedBF16Config,
    "tensorboard": TensorBoardConfig,
    "csv_monitor": CSVConfig,
    "wandb": WandbConfig,
    "comet": CometConfig,
    "comms_logger": CommsLoggerConfig,
    "timers.throughput": DeepSpeedThroughputTimerConfig,
}


def table_at(key):
    table = ds_keys.DEEPSPEED_KEYS
    for part in key.split("."):
        table = table[part]
    return table


@pytest.mark.parametrize("section", MODELS)
def test_a_section_has_the_keys_and_types_of_deepspeeds_model(section):
    table, model = table_at(section), MODELS[section]
    theirs = {}
    for name, field in model.model_fields.items():
        theirs[name] = field.annotation
        if field.alias:
            theirs[field.alias] = field.annotation
            model(**{name: field.get_default()})  # the name is accepted beside the alias
    refused = {key.removeprefix(f"{section}.") for key in ds_keys.REFUSED if key.startswith(f"{section}.")}
    assert table.keys() | (refused & theirs.keys()) == theirs.keys()
    for name, kind in table.items():
        if theirs[name] in (int, float, bool, str):
            assert kind is theirs[name], name
        elif typing.get_origin(theirs[name]) is typing.Union and type(None) in typing.get_args(theirs[name]):
            assert isinstance(kind, dict) or kind is bool or type(None) in typing.get_args(kind), name


class Recorder(dict):
    """A section that notes every key that somebody looks for in it."""

    seen: typing.ClassVar[set[str]] = set()

    def __init__(self, content, prefix=""):
        super().__init__(content)
        self._prefix = prefix

    def _note(self, key):
        Recorder.seen.add(f"{self._prefix}{key}")

    def get(self, key, default=None):
        self._note(key)
        return super().get(key, default)

    def __contains__(self, key):
        self._note(key)
        return super().__contains__(key)

    def keys(self):
        return self

    def __copy__(self):
        return self


PLAIN_SECTIONS = (
    "flops_profiler",
    "aio",
    "activation_checkpointing",
    "checkpoint",
    "torch_autocast",
    "data_types",
    "optimizer",
)


def test_the_top_level_and_the_plain_sections_are_what_deepspeed_reads():
    Recorder.seen.clear()
    sections = {name: Recorder({}, f"{name}.") for name in PLAIN_SECTIONS}
    sections["torch_autocast"] = Recorder({"dtype": "bfloat16"}, "torch_autocast.")
    sections["optimizer"] = Recorder({"type": "AdamW"}, "optimizer.")
    sections["scheduler"] = Recorder({"type": "WarmupLR"}, "scheduler.")
    ds_runtime.DeepSpeedConfig(Recorder({"train_batch_size": 1, **sections}))
    top = {key for key in Recorder.seen if "." not in key}
    known = ds_keys.DEEPSPEED_KEYS.keys() | {key for key in ds_keys.REFUSED if "." not in key}
    assert top - known == set(), "DeepSpeed reads keys that the table lacks"
    # DeepSpeed looks for sequence_parallel_size only once the ranks have met.
    assert known - top == {"vitds", "sequence_parallel_size"}, "the table has keys that DeepSpeed does not read"
    for section in (*PLAIN_SECTIONS, "scheduler"):
        theirs = {key.removeprefix(f"{section}.") for key in Recorder.seen if key.startswith(f"{section}.")}
        assert theirs == ds_keys.DEEPSPEED_KEYS[section].keys(), section


def test_removed_keys_are_refused():
    removed = ds_runtime._REMOVED_TOP_LEVEL_CONFIG_KEYS.keys() | {
        f"zero_optimization.{name}" for name in ds_runtime._REMOVED_ZERO_CONFIG_KEYS
    }
    assert removed <= ds_keys.REFUSED.keys()


def test_schedulers_have_the_parameters_of_deepspeeds_classes():
    ours = {name: table.keys() for name, table in ds_keys.SCHEDULERS.items() if name not in ds_keys.VITDS_SCHEDULERS}
    assert ours.keys() == set(lr_schedules.VALID_LR_SCHEDULES)
    for name, keys in ours.items():
        theirs = inspect.signature(getattr(lr_schedules, name)).parameters.keys()
        assert keys == theirs - {"optimizer", "last_batch_iteration"}, name


@pytest.mark.parametrize("name", [name for name in ds_keys.OPTIMIZERS if hasattr(torch.optim, name) and name != "Muon"])
def test_optimizer_parameters_exist_in_torch(name):
    deepspeed_only = {"bias_correction", "adam_w_mode", "torch_adam", "set_grad_none", "fp32_optimizer_states"}
    theirs = inspect.signature(getattr(torch.optim, name)).parameters.keys()
    assert ds_keys.OPTIMIZERS[name].keys() - deepspeed_only <= theirs


def checked(*argv, **keys):
    document = Document(keys, "my.json")
    ds_config.fill_defaults(document)
    apply_edits(document, parse_command_line(argv).edits)
    ds_config.check_keys(document)
    ds_config.check_combinations(document)
    return document


BF16 = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"gradient_acumulation_steps": 2},
            "DeepSpeed would have ignored it and run without gradient accumulation steps",
        ),
        ({"schedular": {}}, 'did you mean "scheduler"?'),
        (
            {"zero_optimization": {"overlap_com": True}},
            'unknown key "zero_optimization.overlap_com"\n  did you mean "overlap_comm"?',
        ),
        ({"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}}, 'did you mean "device"?'),
        ({"checkpoint": {"tag_validaton": "Fail"}}, 'did you mean "tag_validation"?  DeepSpeed would have ignored it'),
        ({"optimizer": {"type": "AdamWW"}}, 'unknown optimizer "AdamWW"\n  did you mean "AdamW"?'),
        ({"optimizer": {"params": {}}}, '"optimizer" has no "type"'),
        ({"optimizer": {"type": "AdamW", "params": {"wd": 0.1}}}, 'unknown key "optimizer.params.wd"'),
        ({"optimizer": {"type": "SGD", "params": {"max_grad_norm": 1}}}, "gradient_clipping"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "1e-3"}}}, 'must be a number, not the text "1e-3"'),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, "write its value: 0.001"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 1.0]}}}, "below 1"),
        ({"optimizer": {"type": "SGD", "params": {"lr": -1}}}, "must not be negative"),
        ({"scheduler": {"type": "WarmupCosine"}}, 'did you mean "WarmupCosineLR"?'),
        ({"scheduler": {"type": "cosine", "params": {"warmup_steps": 3}}}, 'did you mean "warmup_num_steps"?'),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0}}}, "refuses 0 warmup steps"),
        ({"gradient_clipping": "auto"}, "write its value: 1.0"),
        ({"bf16": {"enabled": "auto"}}, "write its value: true or false"),
        ({"optimizer": "auto"}, '"optimizer": "auto" follows from nothing\n  write its value: a section'),
        ({"scheduler": {"type": "WarmupLR", "params": "auto"}}, '"scheduler.params": "auto" follows from nothing'),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": "auto"}}, "write its value: a section"),
        ({"zero_optimization": {"stage": "auto"}}, "write its value: 2"),
        ({"zero_optimization": {"stage": 4}}, "one of 0, 1, 2, 3, not 4"),
        ({"zero_optimization": {"reduce_bucket_size": 5.5}}, "a whole number, not 5.5"),
        ({"zero_optimization": True}, "must be a section"),
        ({"elasticity": {"enabled": True}}, '"elasticity" cannot be used: DeepSpeed has removed it'),
        ({"data_efficiency": {}}, "its own order of samples"),
        ({"zero_optimization": {"zenflow": {}}}, "cannot be used"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "both enabled"),
        ({"bf16": {"enabled": True}}, "use stage 1"),
        ({"fp16": {"enabled": True}, "zero_optimization": {"stage": 0}}, "use stage 1"),
        ({**BF16, "torch_autocast": {"enabled": True}}, "both enabled"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "use stage 1"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "ZeRO is off"),
        ({**BF16, "bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "bf16_optimizer_states"),
        ({"vitds": {"layer_decay": 0.7}, "scheduler": {"type": "WarmupDecayLR"}}, "every layer the same"),
        ({"vitds": {"layer_decay": 0.7}, "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1}}}, "linear"),
        (
            {"vitds": {"ema_decay": 0.9}, "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            "fp32",
        ),
        (
            {
                "vitds": {"ema_decay": 0.9},
                "optimizer": {"type": "Adam"},
                "fp16": {"enabled": True, "fp16_master_weights_and_grads": True},
                "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
            },
            "fp32",
        ),
        ({"managed_gradient_accumulation": False}, "leaves the accumulation boundary"),
        ({"optimizer": {"type": "muon"}, "zero_optimization": {"stage": 3}}, "Muon does not work with reduce_scatter"),
        (
            {"optimizer": {"type": "Muon"}, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1}},
            "Muon at ZeRO stage 1 in bf16",
        ),
        ({"checkpoint": {"load_universal": True}}, "--resume"),
        ({"optimizer": {"type": "adagrad"}, "zero_optimization": {"stage": 1}}, "neither schedule nor groups"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "NVMe cannot be saved"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, "stage 2 DeepSpeed keeps"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, 'take out "ratio"'),
        ({**BF16, "gradient_predivide_factor": 2}, "with reduce_scatter"),
        ({"gradient_predivide_factor": 0}, "divided by 0"),
        ({"steps_per_print": 0}, "--log-every"),
        ({**BF16, "bf16": {"enabled": True, "bf16_optimizer_states": True}}, "bf16_master_weights_and_grads"),
        ({**BF16, "data_types": {"param_dtype": "fp32"}}, "param_dtype fp32 in a run in bf16"),
    ],
)
def test_what_is_refused(keys, message):
    with pytest.raises(ConfigError) as error:
        checked(**keys)
    assert message in str(error.value)


def test_a_message_names_file_and_line(tmp_path):
    path = tmp_path / "my.json"
    path.write_text('{\n "train_batch_size": 8,\n // fp16: off\n "zero_optimization": {\n  "stge": 2\n }\n}')
    with pytest.raises(ConfigError) as error:
        ds_config.check_keys(read_document(str(path)))
    assert str(error.value) == f'config error  {path}:5  unknown key "zero_optimization.stge"\n  did you mean "stage"?'


def test_every_auto_that_follows_from_nothing_is_named_at_once(tmp_path):
    """As in a file of Hugging Face's, beside some that do follow."""
    path = tmp_path / "hf.json"
    path.write_text(
        """{"bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": "auto"}},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
        "gradient_clipping": "auto",
        "train_batch_size": "auto"}"""
    )
    with pytest.raises(ConfigError) as error:
        ds_config.check_keys(read_document(str(path)))
    assert str(error.value).splitlines() == [
        f'config error  {path}:1  "bf16.enabled", "gradient_clipping", "optimizer.params.weight_decay": '
        '"auto" follows from nothing',
        "  write their values:",
        f'  {path}:1  "bf16.enabled": true or false',
        f'  {path}:4  "gradient_clipping": 1.0',
        f'  {path}:2  "optimizer.params.weight_decay": a number',
    ]


def test_keys_without_effect_are_named_with_their_reason():
    document = checked(
        zero_optimization={"stage": 2, "stage3_max_live_parameters": 1e9, "offload_param": {"device": "cpu"}},
        activation_checkpointing={"partition_activations": True, "cpu_checkpointing": True},
        dataloader_drop_last=False,
    )
    first, second = ds_config.without_effect(document)
    assert first.startswith(
        '"activation_checkpointing.partition_activations" has no effect: it needs model parallelism'
    )
    assert "at stage 2: stage3_max_live_parameters, offload_param belong to stage 3" in second
    stage_3 = checked(zero_optimization={"stage": 3, "stage3_max_live_parameters": 1e9, "round_robin_gradients": True})
    assert ds_config.without_effect(stage_3) == [
        "zero_optimization at stage 3: round_robin_gradients belong to stages 1 and 2 and have no effect"
    ]


@pytest.mark.parametrize(
    ("keys", "argv", "world_size", "expected"),
    [
        ({"train_batch_size": 64}, [], 2, (64, 32, 1)),
        ({"train_batch_size": 64, "train_micro_batch_size_per_gpu": 8}, [], 2, (64, 8, 4)),
        ({"train_batch_size": 64, "gradient_accumulation_steps": 4}, [], 2, (64, 8, 4)),
        ({"train_micro_batch_size_per_gpu": 8}, [], 4, (32, 8, 1)),
        ({"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 2}, [], 4, (64, 8, 2)),
        (
            {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": "auto"},
            [],
            2,
            (16, 8, 1),
        ),
        ({"train_batch_size": 64}, ["--train-batch-size", "32"], 1, (32, 32, 1)),
        ({"train_batch_size": 64}, ["--gradient-accumulation-steps", "8"], 2, (64, 4, 8)),
        (
            {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 4},
            ["--micro-batch-size", "4", "--gradient-accumulation-steps", "2"],
            2,
            (16, 4, 2),  # two flags determine the third value
        ),
        ({}, ["--train-batch-size=6", "--micro-batch-size=1", "--gradient-accumulation-steps=3"], 2, (6, 1, 3)),
    ],
)
def test_the_batch_triangle(keys, argv, world_size, expected):
    assert ds_config.solve_batch(checked(*argv, **keys), world_size) == Batch(*expected, world_size)


@pytest.mark.parametrize(
    ("keys", "argv", "world_size"),
    [
        ({"train_batch_size": 10}, [], 3),
        ({"train_batch_size": 2}, [], 4),
        ({"train_batch_size": 9, "train_micro_batch_size_per_gpu": 4}, [], 2),
        ({"train_batch_size": 512, "train_micro_batch_size_per_gpu": 32, "gradient_accumulation_steps": 8}, [], 3),
        (
            {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 4},
            ["--micro-batch-size=3"],
            2,
        ),
        ({"train_batch_size": 7, "gradient_accumulation_steps": 2}, [], 1),
    ],
)
def test_batch_sizes_that_do_not_multiply_out_get_three_choices_to_paste(keys, argv, world_size):
    with pytest.raises(ConfigError) as error:
        ds_config.solve_batch(checked(*argv, **keys), world_size)
    choices = [line.strip() for line in str(error.value).splitlines() if line.strip().startswith("--train-batch-size")]
    assert len(choices) == len(set(choices)) == 3
    for choice in choices:  # pasted behind the same command, each is accepted
        solved = ds_config.solve_batch(checked(*argv, *choice.split(), **keys), world_size)
        assert solved.global_batch == solved.micro_batch * solved.accumulation_steps * world_size


def test_no_batch_size_at_all():
    with pytest.raises(ConfigError, match="no batch size"):
        ds_config.solve_batch(checked(gradient_accumulation_steps=2), 1)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (
            {"type": "AdamW"},
            OptimizerPlan("AdamW", {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}),
        ),
        (
            {"type": "adam", "params": {"lr": 1, "torch_adam": True, "betas": [0.8, 0.9]}},
            OptimizerPlan("AdamW", {"lr": 1.0, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.01}),
        ),
        (
            {"type": "Adam", "params": {"adam_w_mode": False, "torch_adam": True, "fused": True}},
            OptimizerPlan("Adam", {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}),
        ),
        (
            {"type": "SGD", "params": {"momentum": 0.9}},
            OptimizerPlan("SGD", {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.0}),
        ),
        ({"type": "Lion", "params": {"lr": 1e-4}}, None),
    ],
)
def test_the_optimizer_means_what_deepspeed_means(section, expected):
    assert ds_config.optimizer_plan(checked(optimizer=section)) == expected


def test_the_default_recipe():
    document = checked()
    assert ds_config.optimizer_plan(document) == OptimizerPlan(
        "SGD", {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.0}
    )
    assert ds_config.resolve_schedule(document, 100) == []
    assert ds_config.schedule_plan(document, 100) == SchedulePlan("cosine", 0, 100)
    assert document.source("optimizer.params.lr") == "default"


def test_flags_edit_the_schedule():
    document = checked("--warmup-steps", "5", scheduler={"type": "linear", "params": {"total_num_steps": "auto"}})
    ds_config.resolve_schedule(document, 50)
    assert ds_config.schedule_plan(document, 50) == SchedulePlan("linear", 5, 50)
    with pytest.raises(ConfigError, match="5 warmup steps are more than the run's 4"):
        ds_config.schedule_plan(document, 4)
    theirs = {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 7, "warmup_max_lr": 1, "total_num_steps": 50}}
    document = checked("--decay-type", "constant", scheduler=theirs)
    ds_config.resolve_schedule(document, 50)
    assert ds_config.schedule_plan(document, 50) == SchedulePlan("constant", 7, 50)
    document = checked("--num-steps", "60", scheduler={"type": "cosine", "params": {"total_num_steps": 50}})
    assert ds_config.resolve_schedule(document, 60) == []  # the flag sets the schedule's length too
    document = checked(scheduler={"type": "cosine", "params": {"total_num_steps": 50}})
    with pytest.raises(ConfigError, match="50 steps long and the run 60"):
        ds_config.resolve_schedule(document, 60)


def test_deepspeeds_schedulers_pass_through_with_one_warning():
    params = {"warmup_max_lr": "auto", "warmup_min_lr": "auto", "warmup_num_steps": 5, "total_num_steps": "auto"}
    document = checked(
        optimizer={"type": "AdamW", "params": {"lr": 3e-4}}, scheduler={"type": "WarmupDecayLR", "params": params}
    )
    (warning,) = ds_config.resolve_schedule(document, 40)
    assert "two steps at its lowest rate, log warmup" in warning
    assert ds_config.schedule_plan(document, 40) is None
    assert document.get("scheduler.params") == {
        "warmup_max_lr": 3e-4, "warmup_min_lr": 0.0, "warmup_num_steps": 5, "total_num_steps": 40,
    }  # fmt: skip


@pytest.mark.parametrize(("peak", "is_warned"), [({"warmup_max_lr": None}, False), ({}, True)])
def test_a_peak_of_null_is_the_optimizers_rate(peak, is_warned):
    document = checked(scheduler={"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"} | peak})
    warnings = ds_config.resolve_schedule(document, 40)
    assert any("not to the optimizer's lr" in warning for warning in warnings) == is_warned


def resolved(*argv, world_size=1, num_parameters=10**9, **keys):
    document = checked(*argv, **({"train_batch_size": 8} | keys))
    ds_config.resolve_schedule(document, 10)
    plan = ds_config.optimizer_plan(document)
    own_schedule = ds_config.schedule_plan(document, 10) is not None
    batch = ds_config.solve_batch(document, world_size)
    return ds_config.deepspeed_dict(
        document,
        batch,
        optimizer_type=plan and plan.type,
        own_schedule=own_schedule,
        num_parameters=num_parameters,
    )


def test_what_deepspeed_is_given():
    buckets = {"stage": 2, "reduce_bucket_size": "auto", "allgather_bucket_size": 2e8}
    ds = resolved(
        **(BF16 | {"zero_optimization": buckets}),
        vitds={"seed": 1},
        activation_checkpointing={"cpu_checkpointing": True},
        wall_clock_breakdown=True,
    )
    assert "auto" not in json.dumps(ds)
    assert not ds.keys() & {"vitds", "activation_checkpointing", "scheduler", "optimizer"}
    assert ds["zero_optimization"] == {
        "stage": 2, "allgather_bucket_size": 200_000_000, "reduce_bucket_size": 500_000_000,
    }  # fmt: skip
    assert ds["data_types"] == {"grad_accum_dtype": "fp32"}
    assert ds["zero_allow_untested_optimizer"] is True  # SGD
    assert ds["wall_clock_breakdown"] is True
    assert ds["gradient_clipping"] == 1.0
    theirs = ds_runtime.DeepSpeedConfig(dict(ds))
    assert (theirs.train_micro_batch_size_per_gpu, theirs.gradient_accumulation_steps) == (8, 1)
    assert theirs.zero_optimization_stage == 2 and theirs.bfloat16_config.enabled


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(("stated", "size"), [({}, 86_000_000), ({"reduce_bucket_size": 25_000_000}, 25_000_000)])
def test_the_bucket_of_gradients_is_not_larger_than_the_model(stage, stated, size):
    ds = resolved(zero_optimization={"stage": stage} | stated, num_parameters=86_000_000)
    assert ds["zero_optimization"]["reduce_bucket_size"] == size


def test_what_the_user_says_stays():
    keys = BF16 | {"data_types": {"grad_accum_dtype": "bf16"}, "gradient_clipping": 0, "steps_per_print": 5}
    ds = resolved(optimizer={"type": "Lion", "params": {"lr": 1e-4}}, **keys)
    assert ds["data_types"]["grad_accum_dtype"] == "bf16"
    assert (ds["gradient_clipping"], ds["steps_per_print"]) == (0.0, 5)
    assert ds["optimizer"] == {"type": "Lion", "params": {"lr": 1e-4}}
    assert "grad_accum_dtype" not in resolved().get("data_types", {})


OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("optimizer", "zero", "has_them"),
    [("AdamW", OFFLOAD, True), ("Adam", OFFLOAD, True), ("SGD", OFFLOAD, False), ("AdamW", {"stage": 2}, False)],
)
def test_masters_in_16_bits_are_for_an_adam_that_deepspeed_builds(optimizer, zero, has_them):
    fp16 = {"enabled": True, "fp16_master_weights_and_grads": True}
    keys = {"fp16": fp16, "optimizer": {"type": optimizer}, "zero_optimization": zero}
    document = checked(**keys)
    assert (ds_config.optimizer_plan(document) is None) == has_them
    (warning,) = ds_config.without_effect(document) + ds_config.about_precision(document)
    assert ("masters in 16 bits" in warning, "the masters stay fp32" in warning) == (has_them, not has_them)
    ds = resolved(**keys)
    assert ds["fp16"].get("fp16_master_weights_and_grads", False) == has_them
    assert ("optimizer" in ds) == has_them, "DeepSpeed builds it"


def test_float16_autocast_says_what_has_no_effect_in_it():
    autocast = {"enabled": True, "dtype": "torch.float16", "lower_precision_safe_modules": ["torch.nn.Linear"]}
    (warning,) = ds_config.without_effect(checked(torch_autocast=autocast, zero_optimization={"stage": 1}))
    assert "lower_precision_safe_modules" in warning


@pytest.mark.parametrize(
    "zero", [{"stage": 3, "offload_optimizer": {"device": "cpu"}}, {"stage": 1, "cpu_offload": True}]
)
def test_offload_keeps_the_optimizer_that_vitds_builds(zero):
    ds = resolved(zero_optimization=zero, optimizer={"type": "AdamW"})
    assert ds["zero_force_ds_cpu_optimizer"] is False
    assert "zero_allow_untested_optimizer" not in ds
    ds_runtime.DeepSpeedConfig(dict(ds))
