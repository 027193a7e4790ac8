"""The command line is a promise: a flag may be added here, none may leave or change what it sets."""

import pytest

from vitds.errors import UsageError
from vitds.flags import FLAGS, parse_command_line

FROZEN = {
    "--deepspeed_config": "",
    "--data": "vitds.data.path",
    "--name": "vitds.name",
    "--output-dir": "vitds.output_dir",
    "--pretrained": "vitds.pretrained",
    "--sampling": "vitds.data.sampling",
    "--samples-per-epoch": "vitds.data.samples_per_epoch",
    "--allow-pipe": "vitds.data.allow_pipe",
    "--loss": "vitds.loss",
    "--label-smoothing": "vitds.label_smoothing",
    "--class-weights": "vitds.class_weights",
    "--train": "vitds.train",
    "--model": "vitds.model",
    "--image-size": "vitds.image_size",
    "--num-classes": "vitds.num_classes",
    "--activation-checkpointing": "vitds.activation_checkpointing",
    "--compile": "vitds.compile",
    "--train-batch-size": "train_batch_size",
    "--micro-batch-size": "train_micro_batch_size_per_gpu",
    "--gradient-accumulation-steps": "gradient_accumulation_steps",
    "--auto-micro-batch": "vitds.auto_micro_batch",
    "--eval-batch-size": "vitds.eval_batch_size",
    "--num-steps": "vitds.num_steps",
    "--epochs": "vitds.epochs",
    "--stop-at-step": "vitds.stop_at_step",
    "--warmup-steps": "scheduler.params.warmup_num_steps",
    "--decay-type": "scheduler.type",
    "--layer-decay": "vitds.layer_decay",
    "--ema-decay": "vitds.ema_decay",
    "--extend-to": "vitds.extend_to",
    "--eval-every": "vitds.eval_every",
    "--save-every": "vitds.save_every",
    "--log-every": "vitds.log_every",
    "--profile": "vitds.profile",
    "--keep-last": "vitds.keep_last",
    "--keep-every": "vitds.keep_every",
    "--resume": "vitds.resume",
    "--workers": "vitds.workers",
    "--seed": "vitds.seed",
    "--max-bad-samples": "vitds.max_bad_samples",
    "--set": "",
    "--deepspeed": "",
    "--local_rank": "",
}


def test_the_flags_are_frozen():
    assert {flag.name: flag.key for flag in FLAGS.values()} == FROZEN


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("--lr", "--set optimizer.params.lr=VALUE"),
        ("--learning-rte", "--set optimizer.params.lr=VALUE"),
        ("--weight_dekay", "--set optimizer.params.weight_decay=VALUE"),
        ("--zero_stage", "--set zero_optimization.stage=N"),
        ("--batch-size", "--train-batch-size N"),
        ("--mixup-alpha", "--set data.mixup_alpha=VALUE"),
        ("--warmup-step", 'did you mean "--warmup-steps"?'),
    ],
)
def test_flags_of_other_trainers_are_pointed_to_ours(flag, hint):
    with pytest.raises(UsageError) as error:
        parse_command_line([flag, "1"])
    assert hint in error.value.fix
