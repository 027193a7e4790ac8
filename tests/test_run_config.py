import dataclasses

import pytest

from vitds import ds_keys
from vitds.document import Document
from vitds.errors import ConfigError, UsageError
from vitds.flags import FLAGS, apply_edits, help_text, parse_command_line
from vitds.run_config import DataConfig, RunConfig, entries, run_config


def parsed(*argv, **section):
    document = Document({"vitds": section}, "my.json")
    apply_edits(document, parse_command_line(argv).edits)
    return run_config(document), document


def test_the_defaults():
    run, _ = parsed()
    assert run == RunConfig()
    assert (run.seed, run.log_every, run.keep_last, run.output_dir, run.resume, run.train) == (
        42,
        10,
        3,
        "runs",
        "auto",
        "all",
    )
    assert (run.eval_every, run.save_every, run.eval_batch_size, run.workers) == (None, None, 64, None)
    assert run.data == DataConfig(crop_scale=(0.05, 1.0), crop_ratio=(0.75, 4 / 3))


def test_every_entry_is_explained_in_one_line():
    for key, (_, one) in entries().items():
        text = one.metadata["help"]
        assert text and "\n" not in text and len(text) < 100, key


def test_a_flag_wins_over_the_file():
    run, document = parsed(
        "--seed", "7", "--data=d", "--set", "data.mixup_alpha=0.2", seed=3, log_every=5, data={"flip": 0}
    )
    assert (run.seed, run.log_every, run.data.path, run.data.mixup_alpha, run.data.flip) == (7, 5, "d", 0.2, 0.0)
    assert document.source("vitds.seed") == "flag --seed"
    assert document.source("vitds.data.mixup_alpha") == "flag --set data.mixup_alpha"


def test_underscores_equal_hyphens_and_the_last_flag_counts():
    command = parse_command_line(
        "--deepspeed --deepspeed-config a.json --local-rank=3 --num_steps 5 --num-steps=6 --image-size 32x48".split()
    )
    assert command.config_file == "a.json"
    assert [(edit.key, edit.value) for edit in command.edits] == [
        ("vitds.num_steps", 5),
        ("vitds.num_steps", 6),
        ("vitds.image_size", (32, 48)),
    ]
    assert parse_command_line(["--deepspeed_config=b.json", "--local_rank", "0"]).config_file == "b.json"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num-step", "3"], 'unknown flag --num-step\n  did you mean "--num-steps"?'),
        (["--warmup", "3"], "unknown flag --warmup"),
        (["data"], 'unexpected argument "data"'),
        (["--seed"], "--seed needs a value"),
        (["--seed", "--name", "x"], "--seed needs a value"),
        (["--seed", "x"], '--seed x  must be a whole number, not the text "x"'),
        (["--num-steps", "0"], "must be at least 1, not 0"),
        (["--num-steps", "-5"], "must be at least 1, not -5"),
        (["--train-batch-size", "0"], "must be at least 1"),
        (["--warmup-steps", "-1"], "must be at least 0"),
        (["--decay-type", "exponential"], "one of linear, cosine, constant"),
        (["--train", "last-0"], "last-K such as last-2"),
        (["--name", "a/b"], "plain directory name"),
        (["--epochs", "0"], "must be above 0, not 0"),
        (["--seed", "18446744073709551616"], "must be below 9223372036854775808"),
        (["--set", "data.flip=1.5"], "must be at most 1, not 1.5"),
        (["--max-bad-samples", "1"], "below 1"),
        (["--num-steps", "3", "--epochs", "2"], "--num-steps and --epochs contradict each other"),
        (["--set", "seed"], "write --set KEY=VALUE"),
        (["--set", "data.mixup=1"], 'did you mean "data.mixup_alpha"?'),
        (["--set", "gradient_cliping=1"], 'did you mean "gradient_clipping"?'),
        (["--set", "optimizer.params.learning_rate=1"], "unknown key"),
        (["--set", "zero_optimization.overlap_com=true"], 'did you mean "overlap_comm"?'),
        (["--set", "fp16.enabled=1"], "must be true or false, not 1"),
        (["--set", "data.flip=often"], "must be a number"),
        (["--loss", "ce"], 'did you mean "softmax"?'),
        (["--compile", "max-autotune"], 'did you mean "max-autotune-no-cudagraphs"?'),
        (["--compile", "reduce-overhead"], "must be true or false or max-autotune-no-cudagraphs, not the text"),
    ],
)
def test_command_lines_that_are_refused(argv, message):
    with pytest.raises(UsageError) as error:
        parse_command_line(argv)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) <= 4


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"sede": 1}, 'unknown key "vitds.sede"\n  did you mean "seed"?'),
        ({"data": {"mean": "grey"}}, '"vitds.data.mean" must be a number or a list'),
        ({"data": {"mean": [0.5, 0.5]}}, '"vitds.data.mean" must be one number or three, not [0.5, 0.5]'),
        ({"data": {"std": []}}, "one number or three"),
        ({"data": {"std": 0}}, "must be above 0"),
        ({"data": {"std": [0.2, 0.0, 0.2]}}, "must be above 0, not [0.2, 0.0, 0.2]"),
        ({"data": {"crop_ratio": [0, 0]}}, "must be above 0"),
        ({"data": {"crop_ratio": [1.5, 0.75]}}, "must be [lowest, highest], not [1.5, 0.75]"),
        ({"data": {"crop_scale": [1.0, 0.05]}}, "must be [lowest, highest]"),
        ({"data": {"crop_scale": [0.5, 1.5]}}, "must be at most 1"),
        ({"data": {"crop_fraction": 0}}, "must be above 0"),
        ({"data": {"crop_fraction": 1.01}}, "must be at most 1"),
        ({"data": 3}, 'unknown key "vitds.data"'),
        ({"dropout": 1.0}, "below 1"),
        ({"image_size": [224]}, "must be a whole number or a list of 2 numbers or null"),
        ({"weight_decay_on": "norms"}, "one of matrices, all"),
        ({"attention": "flsh"}, 'did you mean "flash"?'),
        ({"compile": "yes"}, "must be true or false or max-autotune-no-cudagraphs"),
    ],
)
def test_sections_that_are_refused(section, message):
    with pytest.raises(ConfigError) as error:
        run_config(Document({"vitds": section}, "my.json"))
    assert message in str(error.value)


def test_a_length_from_a_flag_replaces_the_files_other_length():
    run, _ = parsed("--epochs", "2.5", num_steps=100)
    assert (run.epochs, run.num_steps) == (2.5, None)
    run, _ = parsed("--num-steps", "7", epochs=3)
    assert (run.epochs, run.num_steps) == (None, 7)


def test_the_two_halves_share_one_key_on_purpose():
    """Activation checkpointing is one switch: --set activation_checkpointing=full, or DeepSpeed's section."""
    shared = {field.name for field in dataclasses.fields(RunConfig)} & ds_keys.DEEPSPEED_KEYS.keys()
    assert shared == {"activation_checkpointing"}


def test_help_names_every_flag_and_every_entry():
    text = help_text()
    for flag in FLAGS.values():
        assert f"  {flag.name} {flag.metavar}" in text
    for key in entries():
        assert key in text or any(flag.key == f"vitds.{key}" for flag in FLAGS.values())
    assert text.count("deepspeed launch/train.py") >= 3
    assert max(map(len, text.splitlines())) <= 160
