"""Packaging. Tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "vitds/__init__.py").read_text()).group(1)

EXTRAS = {
    "test": [
        "pytest",
        "pytest-xdist",
        "timm",
        "scipy",
        "scikit-learn",
        "ruff",
        "mypy",
        "moto[s3]",
        "flask",
        "flask-cors",
    ],
    "track": ["tensorboard", "wandb"],
    "hub": ["huggingface_hub", "transformers"],
    "onnx": ["onnx", "onnxscript", "onnxruntime"],
    "demo": ["scikit-learn"],
}

# Built where a compiler and libjpeg-turbo's headers are (libjpeg62-turbo-dev); elsewhere other decoders serve.
NATIVE_JPEG = Extension(
    "vitds.data.native_jpeg",
    ["vitds/data/native_jpeg.c"],
    libraries=["jpeg"],
    extra_compile_args=["-O3"],
    py_limited_api=True,
    optional=True,
)

setup(
    name="vitds",
    version=VERSION,
    description="Vision Transformers on DeepSpeed: from Google's checkpoints and your images to a trained ViT",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["vitds", "vitds.*"]),
    ext_modules=[NATIVE_JPEG],
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "deepspeed>=0.19",
        "webdataset>=1.0",
        "pyarrow>=17",
        "rich>=13",
        "safetensors>=0.4",
        "simplejpeg>=1.7",
    ],
    extras_require=EXTRAS | {"all": sorted({name for names in EXTRAS.values() for name in names})},
)
