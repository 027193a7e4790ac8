"""Make the expected outputs again, with Google's own code. It is no part of the tests: it needs jax and flax.

    git clone https://github.com/google-research/vision_transformer      # ours are of commit c6de1e5
    git clone https://github.com/google-research/big_vision              # 0127fb6
    pip install jax==0.10.2 flax==0.12.8 ml_collections einops scipy
    python tests/weights/reference/run_google.py vision_transformer big_vision              # every case that is here
    python tests/weights/reference/run_google.py vision_transformer big_vision augreg-1k__ViT-B_8__224

Float32 on the CPU. tensorflow, pandas, tqdm and packaging, which Google's loaders import and hardly use, are stood in
for. A case that exists is compared with what comes out, a new one is written.
"""

import json
import os
import sys
import tempfile
import types
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
import flax.linen as nn
import flax.training.checkpoints  # noqa: F401  (before the stand-ins: flax looks for a real tensorflow)
import jax
import ml_collections
import numpy as np
import scipy.ndimage

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reference import gen_big_vision, gen_npz

NUM_LOGITS = 256  # stored of each image; the projection covers the others


def main() -> None:
    """Run the cases named, or all."""
    vision_transformer, big_vision, *cases = sys.argv[1:]
    jax.config.update("jax_default_matmul_precision", "highest")
    for name in ("tensorflow", "tensorflow.io", "tensorflow.io.gfile", "pandas", "tqdm", "packaging"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["tensorflow.io"].gfile = sys.modules["tensorflow.io.gfile"]
    sys.modules["tensorflow.io.gfile"].GFile = open
    sys.modules["packaging"].version = types.SimpleNamespace(parse=lambda text: tuple(map(int, text.split(".")[:3])))
    sys.path[:0] = [vision_transformer, big_vision]

    everything = sorted(path.stem for path in (gen_npz.HERE / "expected").glob("*.npz"))
    for case in cases or everything:
        keep(gen_npz.HERE / "expected" / f"{case}.npz", run_vision_transformer(case))
    if not cases:
        keep(gen_big_vision.EXPECTED, run_big_vision())


def keep(path: Path, found: dict) -> None:
    """Write a new file, or say by how much the existing one differs."""
    if not path.exists():
        np.savez_compressed(path, **found)
        print(f"{path.name}: written")
        return
    with np.load(path) as expected:
        parts = [part for part in expected.files if part not in ("meta", "logits_float64")]
        differences = {part: float(np.abs(expected[part] - np.asarray(found[part])).max()) for part in parts}
    worst = max(differences, key=differences.get)
    print(f"{path.name}: at most {differences[worst]:.1e} off what is here, in {worst}")


def run_vision_transformer(case: str) -> dict:
    """What vit_jax gives for `variant__model__images`, in the form of the expected files."""
    from vit_jax import checkpoint, models_vit

    variant, model, size = case.split("__")
    spec, native = gen_npz.spec(model), gen_npz.native_size(model, variant)
    images = gen_npz.normalise(gen_npz.images(size))
    pixels = images.shape[1]
    config = ml_collections.ConfigDict(
        {
            "patches": {"size": (spec["patch"],) * 2},
            "hidden_size": spec["width"],
            "transformer": {"mlp_dim": spec["mlp"], "num_heads": spec["heads"], "num_layers": spec["depth"]},
            "classifier": "token",
            "representation_size": spec["width"] if variant == "imagenet21k" and pixels == native else None,
        }
    )
    if spec["resnet"] is not None:
        config.resnet = ml_collections.ConfigDict({"num_layers": spec["resnet"], "width_factor": spec["rwidth"]})
    classes = spec["n1"] if variant in ("imagenet21k+imagenet2012", "augreg-1k") else spec["n21"]
    network = models_vit.VisionTransformer(num_classes=classes, **config)
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/weights.npz"
        gen_npz.write(model, variant, path)
        params = checkpoint.load(path)
        if pixels != native:  # as for fine-tuning, but with the stored head
            shapes = jax.eval_shape(lambda: network.init(jax.random.PRNGKey(0), images, train=False))["params"]
            fresh = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), dict(shapes))
            head = params["head"]
            params = checkpoint.load_pretrained(pretrained_path=path, init_params=fresh, model_config=config)
            params = {**params, "head": head}
    params.setdefault("pre_logits", {})
    logits, state = network.apply(
        {"params": params}, images, train=False, capture_intermediates=True, mutable=["intermediates"]
    )
    logits, inner = np.asarray(logits), state["intermediates"]

    def output(tree: dict) -> np.ndarray:
        return np.asarray(tree["__call__"][0])

    def mean_std(x: np.ndarray) -> np.ndarray:
        return np.array([x.mean(dtype=np.float64), x.std(dtype=np.float64)], np.float32)

    encoder = inner["Transformer"]
    embedding = output(inner["embedding"])
    embedding = embedding.reshape(len(embedding), -1, spec["width"])
    positioned = output(encoder["posembed_input"])
    blocks = [output(encoder[f"encoderblock_{i}"]) for i in range(spec["depth"])]
    index = np.unique(np.linspace(0, classes - 1, min(classes, NUM_LOGITS)).astype(np.int32))
    found = {
        "logits_index": index,
        "logits": logits[:, index],
        "logits_projection": logits.astype(np.float64) @ gen_npz.signs(classes).T,
        "top5": np.argsort(-logits, axis=1)[:, :5].astype(np.int32),
        "feature": output(encoder["encoder_norm"])[:, 0],
        "embedding_head": embedding[:, [0, 1, -1], :8],
        "embedding_mean_std": mean_std(embedding),
        "posembed_head": positioned[:, [0, 1, 2, -1], :8],
        "posembed_mean_std": mean_std(positioned),
        "block_cls_head": np.stack([block[:, 0, :8] for block in blocks]),
        "block_mean_std": np.stack([mean_std(block) for block in blocks]),
    }
    if spec["resnet"] is not None:
        root = output(inner["gn_root"])
        if spec["resnet"]:
            stem = output(inner[f"block{len(spec['resnet'])}"])
        else:
            stem = np.asarray(nn.max_pool(nn.relu(root), (3, 3), strides=(2, 2), padding="SAME"))
        found["gn_root_head"] = root[:, 0, 0, :8]
        found["resnet_out_shape"] = np.array(stem.shape)
        found["resnet_out_head"] = stem[:, [0, 0, -1], [0, 1, -1], :8]
        found["resnet_out_mean_std"] = mean_std(stem)
    if config.representation_size:
        found["pre_logits_head"] = np.tanh(output(inner["pre_logits"]))[:, :16]
    meta = {
        "model": model,
        "variant": variant,
        "size": pixels,
        "native": native,
        "classes": classes,
        "atol_fp32": 2e-5 if spec["resnet"] is None else 1e-4,
        "reference": "google-research/vision_transformer Flax code, float32, CPU",
    }
    return found | {"meta": json.dumps(meta)}


def run_big_vision() -> dict:
    """What big_vision gives for every case of gen_big_vision and each of its sizes."""
    from big_vision.models import vit

    found: dict[str, list[np.ndarray]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, case in gen_big_vision.CASES.items():
            path = f"{directory}/{name}.npz"
            gen_big_vision.write(name, Path(path))
            config = {
                "patch_size": (gen_big_vision.PATCH,) * 2,
                "width": gen_big_vision.WIDTH,
                "depth": gen_big_vision.DEPTH,
                "mlp_dim": gen_big_vision.MLP,
                "num_heads": gen_big_vision.HEADS,
                "posemb": "sincos2d" if case.sincos else "learn",
                "rep_size": case.rep_size or False,
                "pool_type": case.pool,
                "scan": case.scan,
            }
            network = vit.Model(num_classes=case.num_classes or None, **config)
            tower = ":img" if case.prefix.endswith("img/") else ""
            side = gen_big_vision.NATIVE
            fresh = network.init(jax.random.PRNGKey(0), gen_big_vision.images(side, side))["params"]
            for size in gen_big_vision.SIZES:
                params = vit.load(dict(fresh), path + tower, config)
                if not case.sincos and size != (side, side):
                    # The call of its resample_posemb, for each axis by itself, on float32.
                    old, new = side // gen_big_vision.PATCH, [pixels // gen_big_vision.PATCH for pixels in size]
                    grid = np.asarray(params["pos_embedding"]).astype(np.float32).reshape(old, old, -1)
                    grid = scipy.ndimage.zoom(grid, (new[0] / old, new[1] / old, 1), order=1)
                    params["pos_embedding"] = grid.reshape(1, -1, gen_big_vision.WIDTH)
                logits, out = network.apply({"params": params}, gen_big_vision.images(*size))
                tokens = out["with_posemb"][:, np.array([0, 1, -1]), :8]
                for part, array in (("logits", logits), ("feature", out["head_input"]), ("tokens", tokens)):
                    found.setdefault(f"{name}/{part}", []).append(np.asarray(array, np.float32))
    return {key: np.stack(arrays) for key, arrays in found.items()}


if __name__ == "__main__":
    main()
