"""Google's published ViT files: where each lies, what is in it, and the accuracies published for it. No torch.

A file is named COLLECTION/MODEL, after the bucket's folders and our model names; Google's own path names it as well:

    imagenet21k/ViT-B_16                   pre-trained on ImageNet-21k, 224 px
    imagenet21k+imagenet2012/ViT-B_16      then fine-tuned on ImageNet, 384 px (ViT-B_16-224: 224 px)
    augreg/ViT-B_16                        pre-trained on ImageNet-21k with AugReg, 224 px
    augreg+imagenet2012/ViT-B_16           then fine-tuned on ImageNet, 384 px

Byte counts and hashes were never published. `size_range` is what follows from the number of parameters.

Sources: names and addresses of the first two collections are those of jeonsworld/ViT-pytorch; AugReg's are from
README.md of google-research/vision_transformer at commit c6de1e5. Every accuracy has its own source beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote, unquote

from vitds.errors import UsageError, did_you_mean
from vitds.model.registry import get_spec, num_parameters

BUCKET = "https://storage.googleapis.com/vit_models"
README = "github.com/google-research/vision_transformer, README.md"

DEFAULT_COLLECTION = "imagenet21k"
_ZIP_OVERHEAD_BYTES = 64 * 1024  # headers of a few hundred arrays; next to a real file nothing, next to a test's much


@dataclass(frozen=True)
class PublishedWeights:
    """One file of Google's bucket. Units: image_size in pixels, pre_logits the width of that layer, top1 in percent."""

    name: str
    path: str  # in the bucket
    model: str
    image_size: int
    num_classes: int
    pre_logits: int | None
    top1: float | None  # published accuracy of the file as it is, on ImageNet's validation set
    source: str  # of top1

    @property
    def collection(self) -> str:
        """The part of its name before the slash."""
        return self.name.partition("/")[0]

    @property
    def short_name(self) -> str:
        """The part of its name after the slash."""
        return self.name.partition("/")[2]

    @property
    def file_name(self) -> str:
        """What the file is called, in the bucket and on disk."""
        return self.path.rpartition("/")[2]

    @property
    def num_parameters(self) -> int:
        """Exact number of parameters of this file, head and pre_logits included."""
        return num_parameters(get_spec(self.model), self.image_size, self.num_classes, self.pre_logits)

    @property
    def size_range(self) -> tuple[int, int]:
        """Fewest and most bytes that the file can have: float32 parameters, and at most 1 % of headers around them."""
        least = 4 * self.num_parameters
        return least, least + least // 100 + _ZIP_OVERHEAD_BYTES

    def url(self, base: str = BUCKET) -> str:
        """The file's address; a + becomes %2B, as Google asks for, so that no server reads it as a space."""
        return f"{base.rstrip('/')}/{quote(self.path)}"


def _original() -> list[PublishedWeights]:
    """The files of the first paper."""
    found = []
    for model in ("ViT-B_16", "ViT-B_32", "ViT-L_16", "ViT-L_32", "ViT-H_14", "R50-ViT-B_16"):
        path = f"imagenet21k/{_google_name(model)}.npz"
        width = get_spec(model).width
        found.append(PublishedWeights(f"imagenet21k/{model}", path, model, 224, 21843, width, None, ""))
    for stem, top1, source in (
        ("ViT-B_16-224", 81.2, README),
        ("ViT-B_16", 84.2, "google-research/vision_transformer issue 6"),
        ("ViT-B_32", 81.7, "google-research/vision_transformer issue 6"),
        ("ViT-L_16-224", 82.7, README),
        ("ViT-L_16", None, ""),
        ("ViT-L_32", None, ""),
        ("R50-ViT-B_16", 85.082, "google-research/vision_transformer issue 39"),
    ):
        model, collection = stem.removesuffix("-224"), "imagenet21k+imagenet2012"
        size = 224 if stem.endswith("-224") else 384
        path = f"{collection}/{_google_name(stem)}.npz"
        found.append(PublishedWeights(f"{collection}/{stem}", path, model, size, 1000, None, top1, source))
    return found


# The recommended AugReg files: model, pre-training, fine-tuning, published ImageNet accuracy in percent at 384 px.
_AUGREG = [
    ("ViT-L_16",      "L_16-i21k-300ep-lr_0.001-aug_strong1-wd_0.1-do_0.0-sd_0.0",     "lr_0.01", 85.59),
    ("ViT-B_16",      "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0",     "lr_0.03", 85.49),
    ("ViT-S_16",      "S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0",     "lr_0.03", 83.73),
    ("R50-ViT-L_32",  "R50_L_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1", "lr_0.01", 85.99),
    ("R26-ViT-S_32",  "R26_S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0",  "lr_0.01", 83.85),
    ("ViT-Ti_16",     "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0",      "lr_0.03", 78.22),
    ("ViT-B_32",      "B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0",      "lr_0.01", 83.59),
    ("ViT-S_32",      "S_32-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0",        "lr_0.01", 79.58),
    ("R-ViT-Ti_16",   "R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0",    "lr_0.03", 75.40),
]  # fmt: skip


def _augreg() -> list[PublishedWeights]:
    found = []
    for model, upstream, lr, top1 in _AUGREG:
        tuned = f"{upstream}--imagenet2012-steps_20k-{lr}-res_384"
        found += [
            PublishedWeights(f"augreg/{model}", f"augreg/{upstream}.npz", model, 224, 21843, None, None, ""),
            PublishedWeights(
                f"augreg+imagenet2012/{model}", f"augreg/{tuned}.npz", model, 384, 1000, None, top1, README
            ),
        ]
    return found


def _google_name(model: str) -> str:
    """R50-ViT-B_16 as Google writes it, R50+ViT-B_16; plain names as they are."""
    return model if model.startswith("ViT") else model.replace("-", "+", 1)


PUBLISHED: dict[str, PublishedWeights] = {weights.name: weights for weights in [*_original(), *_augreg()]}


def find_weights(name: str) -> PublishedWeights:
    """The file called `name`: COLLECTION/MODEL, MODEL alone, or Google's own path or address of it.

    MODEL alone is the file that fine-tuning starts from, in imagenet21k, where that collection has it.

    Raises: UsageError for a name that is none of these, or one that several collections have and imagenet21k has not.
    """
    wanted = unquote(name).removeprefix(f"{BUCKET}/").removeprefix("gs://vit_models/").removesuffix(".npz")
    found = [weights for weights in PUBLISHED.values() if wanted in _names(weights)]
    if not found:
        valid = [*PUBLISHED, *(weights.short_name for weights in PUBLISHED.values())]
        raise UsageError(
            f'no published file is called "{name}"', fix=did_you_mean(name, valid) + "\nall of them: --list"
        )
    default = [weights for weights in found if weights.collection == DEFAULT_COLLECTION]
    if len(found) > 1 and not default:
        choices = ", ".join(weights.name for weights in found)
        raise UsageError(f'several files are called "{name}"', fix=f"say which: {choices}")
    return (default or found)[0]


def how_to_fetch(file_name: str) -> str:
    """A line for a missing file that is one of the published: the command that fetches it, else nothing."""
    try:
        return f"python tools/fetch_weights.py {find_weights(file_name).name} fetches it"
    except UsageError:
        return ""


def namesakes(weights: PublishedWeights) -> list[PublishedWeights]:
    """The files of other collections that have the same short name."""
    return [one for one in PUBLISHED.values() if one.short_name == weights.short_name and one != weights]


def _names(weights: PublishedWeights) -> set[str]:
    """All that a file may be called: with and without its collection, in our spelling and in Google's."""
    theirs = weights.path.removesuffix(".npz")
    in_google_s_spelling = f"{weights.collection}/{_google_name(weights.short_name)}"
    whole = {weights.name, theirs, in_google_s_spelling}
    return whole | {one.rpartition("/")[2] for one in whole}
