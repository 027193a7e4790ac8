"""vitds.load: any weights as model, transform and class names, prepared and ranked as the evaluation does it."""

import dataclasses
import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from data_sets import write_pixels
from PIL import Image
from rank_processes import ROOT
from weights.reference import gen_npz

import vitds
from vitds.data.decode import encode_png
from vitds.data.images import LooseImage
from vitds.data.loader import EvalLoader
from vitds.data.reader import ShardReader
from vitds.errors import ConfigError, DataError, UsageError, WeightError
from vitds.inference import Transform, choose_device, class_names, most_likely, preprocessing, run_over
from vitds.manifest import Manifest, hash_file, write_manifest
from vitds.run_config import DataConfig
from vitds.weights.ds_file import model_states
from vitds.weights_header import read_header
from vitds.world import World

DATA = DataConfig(
    eval_crop="center", crop_fraction=0.8, interpolation="bicubic", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)
)


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.npz"
    np.savez(path, **gen_npz.weights("tiny", "imagenet21k+imagenet2012"))
    return path


@pytest.fixture(scope="module")
def checkpoint(npz, tmp_path_factory):
    """A checkpoint with class names and a preprocessing that differs from the default in every entry."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints" / "global_step3"
    directory.mkdir(parents=True)
    model = vitds.create_model("auto", weights=npz)
    data = dataclasses.asdict(DATA) | {"path": "somewhere", "flip": 0.1}
    info = {
        "model": model.spec.name,
        "image_size": [48, 48],
        "num_classes": 10,
        "pre_logits": None,
        "classes": [f"thing-{label}" for label in range(10)],
        "dtype": "bf16",
        "config": {"vitds": {"data": data}},
    }
    file = directory / "mp_rank_00_model_states.pt"
    torch.save(model_states(model.state_dict(), info), file)
    write_manifest(directory, Manifest({file.name: hash_file(file)}, info))
    (directory.parent / "latest").write_text("global_step3")
    return directory


def test_weights_unpack_as_model_transform_classes(npz, checkpoint, capsys):
    model, transform, classes = vitds.load(npz)
    assert classes is None and transform.data == DataConfig() and transform.image_size == (48, 48)
    assert "no preprocessing in the weights: squash, mean 0.5, std 0.5 assumed" in capsys.readouterr().err
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    expected = gen_npz.expected("imagenet21k+imagenet2012__tiny__48")
    inputs = torch.stack([transform(pixels) for pixels in gen_npz.images(48)])
    with torch.no_grad():
        np.testing.assert_allclose(model(inputs).numpy(), expected["logits"], atol=2e-5)


def test_a_checkpoint_brings_its_names_and_preprocessing(checkpoint, capsys):
    for path in (checkpoint, checkpoint.parent, checkpoint.parent.parent, str(checkpoint)):
        loaded = vitds.load(path, image_size=(32, 64))
        assert loaded.classes == [f"thing-{label}" for label in range(10)]
        assert loaded.transform.data == DATA and loaded.transform.image_size == loaded.model.image_size == (32, 64)
        assert read_header(path).dtype == "bf16" and next(loaded.model.parameters()).dtype == torch.float32
    assert "no preprocessing" not in capsys.readouterr().err


@pytest.mark.parametrize("data", [DataConfig(), DATA])
def test_the_transform_is_the_evaluators_to_the_last_bit(tmp_path, data):
    dataset = ShardReader(write_pixels(tmp_path / "data"), "val")
    loader = EvalLoader(dataset, data, (24, 40), 8, World(0, 0, 1, 1), 0, "cpu", torch.float32)
    transform = Transform(data, (24, 40))
    for batch in loader:
        for sample_id, expected in zip(batch.ids.tolist(), batch.images, strict=True):
            encoded = dataset.read(sample_id).data
            (tmp_path / "image").write_bytes(encoded)
            with Image.open(io.BytesIO(encoded)) as image:
                forms = [encoded, tmp_path / "image", str(tmp_path / "image"), image, np.asarray(image.convert("RGB"))]
                for form in forms:
                    assert torch.equal(transform(form), expected)


def test_other_modes_become_rgb_as_when_they_are_decoded():
    transform = Transform(DataConfig(), (8, 8))
    for mode in ("L", "LA", "P", "RGBA", "1", "I;16"):
        image = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
        if mode != "I;16":
            image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).convert(mode)
        stream = io.BytesIO()
        image.save(stream, "PNG")
        assert torch.equal(transform(image), transform(stream.getvalue())), mode


def test_floating_point_pixels_are_refused(tmp_path):
    Image.new("F", (4, 4), 0.5).save(tmp_path / "float.tif")
    transform = Transform(DataConfig(), (4, 4))
    for image in (Image.new("F", (4, 4), 0.5), tmp_path / "float.tif"):
        with pytest.raises(DataError, match="floating-point"):
            transform(image)


def test_what_is_no_image_is_named(tmp_path):
    transform = Transform(DataConfig(), (8, 8))
    (tmp_path / "text.png").write_text("no image")
    for image, message in [
        (tmp_path / "text.png", "text.png  no image"),
        (tmp_path / "gone.png", "No such file"),
        (b"", "empty"),
    ]:
        with pytest.raises(DataError) as caught:
            transform(image)
        assert message in str(caught.value)
    for pixels in (
        np.zeros((8, 8, 3)),
        np.zeros((8, 8), np.uint8),
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
    ):
        with pytest.raises(ValueError, match=r"expected \(H, W, 3\) of uint8"):
            transform(pixels)


def test_equal_logits_rank_by_index_however_many_are_asked_for():
    logits = torch.tensor([[0.0] * 40, [1.0, 3.0, 3.0, 2.0] * 10])
    for num in (1, 3, 5, 40, 100):
        ranked = most_likely(logits, num).tolist()
        assert ranked[0] == list(range(min(num, 40)))
        assert ranked[1][:3] == [1, 2, 5][:num]
    random = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(most_likely(random, 7), random.topk(7).indices)


def test_names_are_known_or_numbered():
    assert class_names(3, None) == ["class 0", "class 1", "class 2"]
    assert class_names(3, ["cat"]) == ["cat", "class 1", "class 2"]
    assert class_names(1, ["cat", "dog"]) == ["cat"]


def test_a_stream_is_read_no_further_than_a_few_batches_ahead(npz):
    stream = io.BytesIO()
    Image.new("RGB", (9, 9)).save(stream, "PNG")
    asked = 0

    def images():
        nonlocal asked
        for number in range(1000):
            asked += 1
            yield LooseImage(str(number), stream.getvalue() if number % 10 else b"no image")

    bad = []
    outputs = run_over(vitds.load(npz), images(), 4, 2, torch.device("cpu"), torch.float32, bad.append)
    order = []
    for count, output in enumerate(outputs, start=1):
        order += [int(image.name) for image in output.images]
        assert asked <= len(order) + len(bad) + 3 * 4
        assert output.logits.shape == (4, 10) and output.features.shape == (4, 32)
        if count == 9:
            break
    assert order == [number for number in range(40) if number % 10][:36]
    assert [error.where for error in bad] == ["0", "10", "20", "30"]


@pytest.mark.gpu
def test_a_gpu_gives_the_same(npz):
    encoded = [encode_png(pixels) for pixels in gen_npz.images(48)]
    on_cpu, on_gpu = (
        next(
            run_over(
                vitds.load(npz),
                [LooseImage(str(number), data) for number, data in enumerate(encoded)],
                batch_size=2,
                workers=1,
                device=choose_device(name),
                dtype=torch.float32,
                on_bad=pytest.fail,
            )
        )
        for name in ("cpu", None)
    )
    torch.testing.assert_close(on_gpu.logits, on_cpu.logits, atol=2e-5, rtol=0)
    torch.testing.assert_close(on_gpu.features, on_cpu.features, atol=2e-5, rtol=0)


def test_preprocessing_can_be_stated_over_that_of_the_weights(npz, checkpoint, capsys):
    stated = {"mean": (0.1, 0.2, 0.3), "eval_crop": "center"}
    assert vitds.load(npz, data=stated).transform.data == dataclasses.replace(DataConfig(), **stated)
    assert "no preprocessing in the weights" not in capsys.readouterr().err
    assert vitds.load(checkpoint, data={"mean": 0.25}).transform.data == dataclasses.replace(DATA, mean=0.25)


def test_preprocessing_that_is_not_valid_is_refused(npz):
    header = dataclasses.replace(read_header(npz), data={"mean": [0.5, 0.5]})
    with pytest.raises(WeightError, match=r"w\.npz|one number or three") as caught:
        preprocessing(header, "w.npz")
    assert caught.value.where == "w.npz"
    with pytest.raises(WeightError):
        preprocessing(dataclasses.replace(header, data={"sharpen": 1}), "w.npz")
    assert preprocessing(dataclasses.replace(header, data={"std": 0.25}), "w.npz") == DataConfig(std=0.25)


def test_what_cannot_be_loaded_says_why(npz, tmp_path):
    with pytest.raises(WeightError, match="does not exist"):
        vitds.load(tmp_path / "none.npz")
    with pytest.raises(ConfigError, match="not divisible"):
        vitds.load(npz, image_size=50)
    with pytest.raises(WeightError, match="not ViT-B_16"):
        vitds.load(npz, model="ViT-B_16")
    assert vitds.load(npz, model="auto:timm").model.spec.gelu == "erf"
    with pytest.raises(UsageError, match='no device "cud"'):
        choose_device("cud")


def test_importing_vitds_imports_no_torch():
    check = "import sys, vitds; assert not {'torch', 'numpy'} & sys.modules.keys(); vitds.load; sys.modules['torch']"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)
