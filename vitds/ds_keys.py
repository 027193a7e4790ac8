"""Every key of DeepSpeed's JSON, with its kind: the table that a configuration is checked against.

It is complete for DeepSpeed 0.19.8; a test compares it with what DeepSpeed reads and with DeepSpeed's own models.
Beside it stand the keys that vitds refuses, those that have no effect here, and the types of optimizers and schedulers.
"""

from __future__ import annotations

from typing import Any, Literal

Table = dict[str, Any]  # key -> kind, or a nested table

_DTYPE = Literal["fp32", "fp16", "bf16"]
_COUNT = int | None

_OFFLOAD_PARAM: Table = {
    "device": Literal["none", "cpu", "nvme"],
    "nvme_path": str | None,
    "buffer_count": int,
    "buffer_size": int,
    "max_in_cpu": int,
    "pin_memory": bool,
}
_OFFLOAD_OPTIMIZER: Table = {
    "device": Literal["none", "cpu", "nvme"],
    "nvme_path": str | None,
    "buffer_count": int,
    "pin_memory": bool,
    "pipeline_read": bool,
    "pipeline_write": bool,
    "fast_init": bool,
    "ratio": float,
    "super_offload": bool,
    "cpuadam_cores_perc": float,
}
STAGE_3: Table = {  # without effect below stage 3
    "offload_param": _OFFLOAD_PARAM,
    "sub_group_size": int,
    "cpu_offload_param": bool,
    **{
        f"{prefix}{name}": kind
        for name, kind in {
            "prefetch_bucket_size": int,
            "param_persistence_threshold": int,
            "model_persistence_threshold": int,
            "max_live_parameters": int,
            "max_reuse_distance": int,
            "gather_16bit_weights_on_model_save": bool,
            "module_granularity_threshold": int,
            "use_all_reduce_for_fetch_params": bool,
            "allgather_sequential": bool,
        }.items()
        for prefix in ("stage3_", "")  # DeepSpeed takes both spellings
    },
    "stage3_gather_fp16_weights_on_model_save": bool,
    "zero_hpz_partition_size": int,
    "zero_quantized_weights": bool,
    "zero_quantized_nontrainable_weights": bool,
    "memory_efficient_linear": bool,
    "pipeline_loading_checkpoint": bool,
    "override_module_apply": bool,
    "log_trace_cache_warnings": bool,
    "save_muon_momentum_buffer_in_memory": bool,
    "leaf_module": {"classes": list[str], "names": list[str], "name_suffixes": list[str]},
}
STAGES_1_AND_2: Table = {  # without effect at stage 3
    "use_multi_rank_bucket_allreduce": bool,
    "allgather_partitions": bool,
    "ignore_unused_parameters": bool,
    "round_robin_gradients": bool,
    "parameter_alignment": bool,
}
_ZERO: Table = {
    "stage": Literal[0, 1, 2, 3],
    "contiguous_gradients": bool,
    "reduce_scatter": bool,
    "reduce_bucket_size": int,
    "allgather_bucket_size": int,
    "overlap_comm": bool | None,
    "compute_grad_norm": bool,
    "load_from_fp32_weights": bool,
    "elastic_checkpoint": bool,
    "offload_optimizer": _OFFLOAD_OPTIMIZER,
    "cpu_offload": bool,
    "cpu_offload_use_pin_memory": bool,
    "zero_quantized_gradients": bool,
    "enable_sanity_checks": bool,
    **STAGES_1_AND_2,
    **STAGE_3,
}
_MONITOR: Table = {"enabled": bool, "output_path": str, "job_name": str}

DEEPSPEED_KEYS: Table = {
    "train_batch_size": int,
    "train_micro_batch_size_per_gpu": int,
    "gradient_accumulation_steps": int,
    "optimizer": {"type": str, "params": dict, "legacy_fusion": bool},
    "scheduler": {"type": str, "params": dict},
    "gradient_clipping": float,
    "fp16": {
        "enabled": bool,
        "auto_cast": bool,
        "loss_scale": float,
        "initial_scale_power": int,
        "loss_scale_window": int,
        "hysteresis": int,
        "consecutive_hysteresis": bool,
        "min_loss_scale": int,
        "fp16_master_weights_and_grads": bool,
    },
    "bf16": {
        "enabled": bool,
        "immediate_grad_update": bool,
        "check_grad_overflow": bool,
        "bf16_master_weights_and_grads": bool,
        "bf16_optimizer_states": bool,
    },
    "torch_autocast": {"enabled": bool, "dtype": str, "lower_precision_safe_modules": list[str]},
    "data_types": {
        "grad_accum_dtype": _DTYPE | None,
        "param_dtype": _DTYPE | None,
        "buffer_dtype": _DTYPE | None,
        "keep_in_fp32_modules": Literal["auto"] | list[str],
    },
    "zero_optimization": _ZERO,
    "zero_allow_untested_optimizer": bool,
    "zero_force_ds_cpu_optimizer": bool,
    "activation_checkpointing": {
        "cpu_checkpointing": bool,
        "partition_activations": bool,
        "contiguous_memory_optimization": bool,
        "number_checkpoints": _COUNT,
        "synchronize_checkpoint_boundary": bool,
        "profile": bool,
    },
    "communication_data_type": _DTYPE | None,
    "seq_parallel_communication_data_type": _DTYPE,
    "prescale_gradients": bool,
    "gradient_predivide_factor": float,
    "gradient_allreduce_op": Literal["mean", "sum"],
    "disable_allgather": bool,
    "managed_gradient_accumulation": bool,
    "steps_per_print": _COUNT,
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "dump_state": bool,
    "log_level": str | None,
    "disable_python_gc": bool,
    "dataloader_drop_last": bool,
    "vocabulary_size": _COUNT,
    "use_data_before_expert_parallelism": bool,
    "comms_logger": {"enabled": bool, "prof_all": bool, "prof_ops": list, "verbose": bool, "debug": bool},
    "flops_profiler": {
        "enabled": bool,
        "recompute_fwd_factor": float,
        "profile_step": int,
        "module_depth": int,
        "top_modules": int,
        "detailed": bool,
        "output_file": str | None,
    },
    "tensorboard": _MONITOR,
    "csv_monitor": _MONITOR,
    "wandb": {"enabled": bool, "group": str | None, "team": str | None, "project": str},
    "comet": {
        "enabled": bool,
        "samples_log_interval": int,
        **dict.fromkeys(("project", "workspace", "api_key", "experiment_name", "experiment_key", "mode"), str | None),
        "online": bool | None,
    },
    "aio": {
        "block_size": int,
        "queue_depth": int,
        "intra_op_parallelism": int,
        "single_submit": bool,
        "overlap_events": bool,
        "use_gds": bool,
    },
    "timers": {"throughput": {"enabled": bool, "synchronized": bool}},
    "checkpoint": {
        "tag_validation": str,
        "load_universal": bool,
        "use_node_local_storage": bool,
        "parallel_write": {"pipeline_stage": bool},
        "checkpoint_serialization": bool,
        "writer": dict,
    },
    "vitds": dict,
}

# Known to DeepSpeed, refused here, each with its reason.
_REMOVED = "DeepSpeed has removed it"
REFUSED: dict[str, str] = {
    "tensor_parallel": "vitds trains data-parallel only",
    "expert_parallel": "vitds has no mixture-of-experts models",
    "sequence_parallel_size": "vitds trains data-parallel only",
    "pipeline": "vitds trains data-parallel only",
    "hybrid_engine": "it is for text generation",
    "weight_quantization": "it is for inference",
    "autotuning": "it starts runs of its own",
    "data_efficiency": "vitds has its own order of samples, which a resume depends on",
    "datastates_ckpt": "vitds writes its own committed checkpoints",
    "bfloat16": 'its name is "bf16"',
    "compile": 'vitds does not call DeepSpeed\'s compiler; "compile" in the "vitds" section compiles the blocks',
    "zero_optimization.zenflow": "it needs DeepSpeed's own CPU Adam, compiled on the machine",
    "zero_optimization.legacy_stage1": "DeepSpeed no longer has the old stage 1",
    **dict.fromkeys(
        (
            "nebula",
            "compression_training",
            "amp",
            "quantize_training",
            "sparse_gradients",
            "eigenvalue",
            "sparse_attention",
        ),
        _REMOVED,
    ),
    **dict.fromkeys(("elasticity", "graph_harvesting", "curriculum_learning", "progressive_layer_drop"), _REMOVED),
    **dict.fromkeys(
        (
            f"zero_optimization.{name}"
            for name in ("mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param")
        ),
        _REMOVED,
    ),
}

# Known to DeepSpeed, without effect here, each with its reason: warned about once.
_MODEL_PARALLEL = "it needs model parallelism, which vitds does not use"
_OWN_CHECKPOINTS = "vitds writes and reads checkpoints through its own file layer"
NO_EFFECT: dict[str, str] = {
    "activation_checkpointing.partition_activations": _MODEL_PARALLEL,
    "activation_checkpointing.contiguous_memory_optimization": _MODEL_PARALLEL,
    "activation_checkpointing.number_checkpoints": "--activation-checkpointing K chooses the blocks",
    "activation_checkpointing.synchronize_checkpoint_boundary": "vitds recomputes with PyTorch's own function",
    "activation_checkpointing.profile": "vitds recomputes with PyTorch's own function",
    "seq_parallel_communication_data_type": _MODEL_PARALLEL,
    "use_data_before_expert_parallelism": _MODEL_PARALLEL,
    "disable_allgather": "DeepSpeed reads it and does nothing with it",
    "vocabulary_size": "there is no vocabulary",
    "dataloader_drop_last": "vitds reads the data itself and drops no sample",
    "checkpoint.tag_validation": _OWN_CHECKPOINTS,
    "checkpoint.parallel_write": _OWN_CHECKPOINTS,
    "checkpoint.checkpoint_serialization": _OWN_CHECKPOINTS,
    "checkpoint.writer": _OWN_CHECKPOINTS,
    "optimizer.legacy_fusion": "vitds builds PyTorch's optimizers",
}
MAY_BE_NEGATIVE = {"flops_profiler.module_depth"}

_ADAM: Table = {
    "lr": float,
    "betas": tuple[float, float],
    "eps": float,
    "weight_decay": float,
    "amsgrad": bool,
    "bias_correction": bool,
    "adam_w_mode": bool,
    "torch_adam": bool,
    "foreach": bool | None,
    "fused": bool | None,
    "set_grad_none": bool,
    "fp32_optimizer_states": bool,
}
_BASE: Table = {"lr": float, "weight_decay": float}
_MUON: Table = {
    "momentum": float,
    "ns_method": str,
    "muon_lr": float,
    "adam_lr": float,
    "betas": tuple[float, float],
    "eps": float,
}
OPTIMIZERS: dict[str, Table] = {
    "AdamW": _ADAM,
    "Adam": _ADAM,
    "SGD": _BASE
    | {"momentum": float, "dampening": float, "nesterov": bool, "foreach": bool | None, "fused": bool | None},
    # Built by DeepSpeed itself:
    "Adagrad": _BASE | {"eps": float, "lr_decay": float, "initial_accumulator_value": float},
    "Lamb": _BASE
    | {"betas": tuple[float, float], "eps": float, "bias_correction": bool, "max_coeff": float, "min_coeff": float},
    "Lion": _BASE | {"betas": tuple[float, float]},
    "Muon": _BASE | _MUON,
    "NAdam": _BASE
    | {"betas": tuple[float, float], "eps": float, "momentum_decay": float, "decoupled_weight_decay": bool},
    "RAdam": _BASE | {"betas": tuple[float, float], "eps": float, "decoupled_weight_decay": bool},
    "RMSprop": _BASE | {"alpha": float, "eps": float, "momentum": float, "centered": bool},
}
BUILT_HERE = ("AdamW", "Adam", "SGD")
_VITDS_SCHEDULE: Table = {"warmup_num_steps": int, "total_num_steps": int}
_WARMUP: Table = {"warmup_num_steps": int, "warmup_type": Literal["log", "linear"]}
_LRS = float | list[float] | None
SCHEDULERS: dict[str, Table] = {
    "linear": _VITDS_SCHEDULE,
    "cosine": _VITDS_SCHEDULE,
    "constant": _VITDS_SCHEDULE,
    # DeepSpeed's own:
    "WarmupLR": _WARMUP | {"warmup_min_lr": _LRS, "warmup_max_lr": _LRS},
    "WarmupDecayLR": _WARMUP | {"warmup_min_lr": _LRS, "warmup_max_lr": _LRS, "total_num_steps": int},
    "WarmupCosineLR": _WARMUP | {"warmup_min_ratio": float, "cos_min_ratio": float, "total_num_steps": int},
    "OneCycle": {
        **dict.fromkeys(("cycle_min_lr", "cycle_max_lr", "cycle_min_mom", "cycle_max_mom"), float),
        **dict.fromkeys(("decay_lr_rate", "decay_mom_rate"), float),
        **dict.fromkeys(("cycle_first_step_size", "cycle_first_stair_count", "decay_step_size"), int),
        **dict.fromkeys(("cycle_second_step_size", "cycle_second_stair_count"), _COUNT),
        "cycle_momentum": bool,
    },
    "LRRangeTest": {
        "lr_range_test_min_lr": _LRS,
        "lr_range_test_step_size": int,
        "lr_range_test_step_rate": float,
        "lr_range_test_staircase": bool,
    },
}
VITDS_SCHEDULERS = ("linear", "cosine", "constant")

# What "auto" may stand for, beside any bucket size of ZeRO (which then has DeepSpeed's default).
AUTO_KEYS = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "scheduler.params.total_num_steps",
    "scheduler.params.warmup_max_lr",
    "scheduler.params.warmup_min_lr",
    "data_types.keep_in_fp32_modules",
}
AUTO_EXAMPLES = {"optimizer.params.lr": "0.001", "gradient_clipping": "1.0", "zero_optimization.stage": "2"}

BATCH_KEYS = {  # the batch triangle, each with its flag
    "train_batch_size": "--train-batch-size",
    "train_micro_batch_size_per_gpu": "--micro-batch-size",
    "gradient_accumulation_steps": "--gradient-accumulation-steps",
}
