"""Package metadata; the tools' settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

VIDEO = ["av>=14.1"]  # the first that tells how a frame is to be turned
TEST = ["pytest>=8", "pytest-xdist", "hypothesis>=6", "safetensors", *VIDEO]
ORACLE = ["torch==2.13.0", "transformers==5.23.0", "accelerate"]  # the last for FP8 checkpoints
GCS = ["etils[epath-gcs]"]

setup(
    name="qwen35_jax",
    version="0.1.0",
    description="Qwen3.5 in JAX: from a Hugging Face checkpoint to text on TPU, GPU and CPU meshes",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["qwen35_jax", "qwen35_jax.*"]),
    package_data={"qwen35_jax": ["assets/tiny/*", "text/*.jinja"]},
    install_requires=[
        "absl-py",
        "etils[epath]",
        "flax>=0.12.8",
        "grain",
        "huggingface_hub",
        "jax>=0.10.2",
        "jinja2",
        "ml_collections",
        "ml_dtypes",
        "numpy>=2",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pillow>=11.3",  # the first that reads AVIF by itself
        "tensorboardX",
        "tensorstore",
        "tokenizers",
        "tqdm",
    ],
    extras_require={
        "tpu": ["jax[tpu]", *GCS],
        "cuda": ["jax[cuda13]"],
        "gcs": GCS,
        "video": VIDEO,
        "test": TEST,
        # The comparison with transformers (tests/oracle).
        "oracle": ORACLE,
        # The TPU and GPU compilers without CUDA's own libraries: enough to compile, not to run. nvcc's wheel has the assembler
        # and libdevice, without which nothing compiles for GPUs where CUDA is not installed; the disassembler shows which
        # instructions the GPU kernels became (tests/aot/sass.py).
        "aot": ["jax[tpu,cuda13-local]", "nvidia-cuda-nvcc", "nvidia-cuda-nvdisasm"],
        # The launchers (launch/): install with -c launch/constraints.txt, without which pip looks for many minutes.
        "launch": ["xmanager==0.8.5.post1", "pyyaml"],
        "dev": [*TEST, *ORACLE, "pre-commit", "ruff==0.17.6"],
    },
)
