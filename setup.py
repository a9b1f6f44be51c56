"""Packaging of shardtune: flat packages, run from the clone or installed."""

from setuptools import setup

PACKAGES = [
    "conf",
    "launch",
    "strategies",
    "trainer",
    "trainer.data",
    "trainer.evaluation",
    "trainer.objectives",
    "trainer.tuning",
]

setup(
    name="shardtune",
    version="0.1.0",
    description="Distributed fine-tuning of language models: DeepSpeed ZeRO and FSDP behind one Hydra config",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"": "."},
    packages=PACKAGES,
    package_data={"conf": ["*.yaml", "*/*.yaml", "*/*.md"]},
    install_requires=[
        "torch>=2.13",
        "transformers>=5.24",
        "accelerate>=1.15",
        "peft>=0.21",
        "datasets>=5.2",
        "deepspeed>=0.19.8",
        "hydra-core>=1.3.8,<1.4",
        "safetensors>=0.8",
        "wandb>=0.31",
        "psutil>=6",
        "gguf>=0.19",  # reads the embedded demo model's file
    ],
    extras_require={
        "gpu": ["flash-attn>=2.8"],
        "tensorboard": ["tensorboard>=2.21"],
        "test": ["pytest>=9", "pytest-timeout>=2.4", "hypothesis>=6.170", "tensorboard>=2.21"],
        "check": ["ruff>=0.17", "mypy>=2.4", "import-linter>=2.17"],
    },
    entry_points={"console_scripts": ["shardtune=launch.main:main"]},
)
