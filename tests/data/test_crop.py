import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms import v2

from vitds.data import decode
from vitds.data.augment import draws
from vitds.data.crop import NUM_DRAWS, eval_box, eval_crop, random_box, train_crop
from vitds.data.decode import JPEG_DECODERS, Decoded
from vitds.run_config import DataConfig

SIZE = (24, 32)


def opened(image: torch.Tensor) -> Decoded:
    return Decoded(image.numpy())


def photo(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8))


def numbers_of(sample_id: int, seed: int = 0, epoch: int = 0, copy: int = 0) -> np.ndarray:
    return draws(seed, np.array([epoch]), np.array([sample_id]), np.array([copy]), NUM_DRAWS)[0]


class FixedDraws:
    """Stands in for `torch` inside RandomResizedCrop.get_params: the same arithmetic, in float64, on our numbers."""

    def __init__(self, numbers: np.ndarray) -> None:
        self.attempts = iter(numbers[:40].reshape(10, 4).tolist())
        self.log, self.exp = torch.log, torch.exp

    def tensor(self, values):
        return torch.tensor(values, dtype=torch.float64)

    def empty(self, _):
        return SimpleNamespace(uniform_=self.uniform_)

    def uniform_(self, low, high):
        if not getattr(self, "is_ratio", False):
            self.attempt = iter(next(self.attempts))
        self.is_ratio = not getattr(self, "is_ratio", False)
        return self.tensor([low + (high - low) * next(self.attempt)])

    def randint(self, low, high, size):
        return torch.tensor([int(low + next(self.attempt) * (high - low))])


@pytest.mark.parametrize(
    "scale, ratio", [((0.05, 1.0), (0.75, 4 / 3)), ((0.3, 0.5), (1.0, 1.0)), ((0.9, 1.0), (2.0, 3.0))]
)
@pytest.mark.parametrize("height, width", [(375, 500), (40, 400), (400, 40), (1, 9)])
def test_boxes_are_those_of_torchvision_on_the_same_numbers(monkeypatch, height, width, scale, ratio):
    image = torch.empty(3, height, width)
    boxes = set()
    for sample_id in range(100):
        numbers = numbers_of(sample_id)
        with monkeypatch.context() as patch:
            patch.setattr(torchvision.transforms.transforms, "torch", FixedDraws(numbers))
            expected = torchvision.transforms.RandomResizedCrop.get_params(image, list(scale), list(ratio))
        box = random_box(height, width, scale, ratio, numbers)
        assert box == tuple(expected)
        boxes.add(box)
    assert len(boxes) > 50 or (height, width) != (375, 500) or ratio == (2.0, 3.0)


@pytest.mark.parametrize("aspect", [1e-3, 1e3])
def test_a_box_is_never_thinner_than_a_pixel(aspect):
    _, _, height, width = random_box(24, 32, (1.0, 1.0), (aspect, aspect), numbers_of(0))
    assert (height, width) == ((24, 1) if aspect < 1 else (1, 32))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_random_crop_is_torchvision_s_resized_crop_of_its_box(interpolation):
    data, image = DataConfig(interpolation=interpolation, flip=0.5), photo(50, 61)
    flipped = 0
    for sample_id in range(20):
        numbers = numbers_of(sample_id)
        box = random_box(50, 61, data.crop_scale, data.crop_ratio, numbers)
        expected = v2.functional.resized_crop(
            image, *box, list(SIZE), v2.InterpolationMode(interpolation), antialias=True
        )
        if numbers[-1] < 0.5:
            expected, flipped = v2.functional.horizontal_flip(expected), flipped + 1
        assert torch.equal(train_crop(opened(image), numbers, data, SIZE), expected)
    assert 0 < flipped < 20


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("height, width", [(50, 61), (61, 50), (300, 41), (8, 8)])
def test_exact_is_torchvision_on_pillow_s_images_bit_for_bit(interpolation, height, width):
    image, mode = photo(height, width), v2.InterpolationMode(interpolation)
    picture = v2.functional.to_pil_image(image)
    data = DataConfig(interpolation=interpolation, resampling="exact", flip=0.0, eval_crop="center")
    for sample_id in range(10):
        numbers = numbers_of(sample_id)
        box = random_box(height, width, data.crop_scale, data.crop_ratio, numbers)
        expected = v2.functional.resized_crop(picture, *box, list(SIZE), mode)
        ours = train_crop(opened(image), numbers, data, SIZE)
        assert torch.equal(ours, v2.functional.pil_to_tensor(expected))
    reference = v2.Compose([v2.Resize(int(24 / 0.875), mode), v2.CenterCrop(24), v2.PILToTensor()])
    assert torch.equal(eval_crop(opened(image), data, (24, 24)), reference(picture))


def jpeg(height: int, width: int, kind: str) -> bytes:
    """A smooth picture with noise as a JPEG of that kind."""
    rng, stream = np.random.default_rng(height), io.BytesIO()
    blots = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((width, height))
    noisy = np.clip(np.asarray(blots) + rng.normal(0, 9, (height, width, 3)), 0, 255).astype(np.uint8)
    image = Image.fromarray(noisy).convert("L" if "grey" in kind else "RGB")
    sampling = {name: number for number, name in enumerate(("444", "422", "420")) if name in kind}
    options = {"subsampling": next(iter(sampling.values()))} if sampling else {}
    image.save(stream, "JPEG", quality=85, progressive="progressive" in kind, **options)
    return stream.getvalue()


KINDS = ["444", "422", "420", "444 progressive", "420 progressive", "grey", "grey progressive"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decoder", JPEG_DECODERS)
def test_exact_from_jpeg_bytes_is_torchvision_s_random_resized_crop_bit_for_bit(monkeypatch, decoder, kind):
    for number, module in enumerate(("native_jpeg", "simplejpeg")):
        if number < JPEG_DECODERS.index(decoder):
            monkeypatch.setattr(decode, module, None)
    if decode.jpeg_decoder_name() != decoder:
        pytest.skip(f"{decoder} is not there")
    for height, width in ((375, 500), (97, 64), (33, 210), (16, 16), (9, 7)):
        data = jpeg(height, width, kind)
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        for sample_id, interpolation in enumerate(("bilinear", "bicubic") * 3):
            config = DataConfig(interpolation=interpolation, resampling="exact", flip=0.0)
            theirs = torchvision.transforms.RandomResizedCrop(
                SIZE, config.crop_scale, config.crop_ratio, v2.InterpolationMode(interpolation)
            )
            numbers = numbers_of(sample_id)
            with monkeypatch.context() as patch:
                patch.setattr(torchvision.transforms.transforms, "torch", FixedDraws(numbers))
                expected = v2.functional.pil_to_tensor(theirs(picture))
            assert torch.equal(train_crop(decode.open_image(data), numbers, config, SIZE), expected)


def test_pad_moves_the_image_by_up_to_four_pixels():
    data, image = DataConfig(train_crop="pad", flip=0.0), photo(*SIZE)
    padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
    windows = {
        padded[:, top : top + SIZE[0], left : left + SIZE[1]].numpy().tobytes(): (top, left)
        for top in range(9)
        for left in range(9)
    }
    seen = {windows[train_crop(opened(image), numbers_of(i), data, SIZE).numpy().tobytes()] for i in range(400)}
    assert {top for top, _ in seen} == {left for _, left in seen} == set(range(9))


@pytest.mark.parametrize("height, width", [(50, 61), (61, 30)])
def test_simple_is_torchvision_s_resize_and_random_crop_with_mirrored_edges(height, width):
    """DeiT III's: the shorter side at the image size, reflect-padded by 4, a crop anywhere in it."""
    data, image = DataConfig(train_crop="simple", flip=0.0), photo(height, width)
    resized = v2.functional.resize(image, [24], antialias=True)
    padded = v2.functional.pad(resized, [4], padding_mode="reflect")
    places = (padded.shape[1] - 24 + 1, padded.shape[2] - 24 + 1)
    seen = set()
    for sample_id in range(300):
        numbers = numbers_of(sample_id)
        top, left = (int(number * num) for number, num in zip(numbers, places, strict=False))
        expected = v2.functional.crop(padded, top, left, 24, 24)
        assert torch.equal(train_crop(opened(image), numbers, data, (24, 24)), expected)
        seen.add((top, left))
    assert {top for top, _ in seen} == set(range(places[0])) and {left for _, left in seen} == set(range(places[1]))


def test_no_crop_and_squash_are_one_plain_resize():
    image = photo(50, 61)
    expected = v2.functional.resize(image, list(SIZE), antialias=True)
    data = DataConfig(train_crop="none", flip=0.0, eval_crop="squash")
    assert torch.equal(train_crop(opened(image), numbers_of(0), data, SIZE), expected)
    assert torch.equal(eval_crop(opened(image), data, SIZE), expected)


@pytest.mark.parametrize("height, width", [(50, 61), (61, 50), (300, 41), (8, 8)])
def test_center_is_torchvision_s_resize_and_center_crop(height, width):
    image = photo(height, width)
    reference = v2.Compose([v2.Resize(int(24 / 0.875), antialias=True), v2.CenterCrop(24)])
    assert torch.equal(eval_crop(opened(image), DataConfig(eval_crop="center"), (24, 24)), reference(image))
    assert eval_crop(opened(image), DataConfig(eval_crop="center", crop_fraction=1.0), SIZE).shape == (3, *SIZE)


@pytest.mark.parametrize("height, width", [(500, 610), (610, 500), (1000, 96)])
@pytest.mark.parametrize("size", [(96, 96), (96, 128)])
def test_the_box_is_what_the_model_sees(height, width, size):
    """A ramp over rows and columns: the transform's corners show which part was kept."""
    rows, columns = torch.arange(height) / height, torch.arange(width) / width
    ramp = 250 * torch.stack([rows[:, None].expand(-1, width), columns.expand(height, -1), rows[:, None] + 0 * columns])
    for data in (DataConfig(), DataConfig(eval_crop="center"), DataConfig(eval_crop="center", crop_fraction=0.5)):
        seen = eval_crop(opened(ramp.to(torch.uint8)), data, size)
        top, left, box_h, box_w = eval_box(height, width, data, size)
        boxed = eval_crop(opened(ramp[:, top : top + box_h, left : left + box_w].to(torch.uint8)), DataConfig(), size)
        assert (seen.int() - boxed.int()).abs().max() <= 4
        assert data.eval_crop == "center" or (top, left, box_h, box_w) == (0, 0, height, width)


@pytest.mark.parametrize("height, width", [(1, 1), (1, 200), (200, 1), (7, 5)])
@pytest.mark.parametrize("crop", ["random", "pad", "simple", "none"])
def test_any_image_reaches_any_size(height, width, crop):
    image = photo(height, width)
    for evaluated in ("squash", "center"):
        data = DataConfig(train_crop=crop, eval_crop=evaluated)
        for output in (train_crop(opened(image), numbers_of(3), data, SIZE), eval_crop(opened(image), data, SIZE)):
            assert output.shape == (3, *SIZE) and output.dtype == torch.uint8
