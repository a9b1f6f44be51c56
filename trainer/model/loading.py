"""Finds a model's files, and loads its config, its tokenizer and its generation settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from strategies.errors import ConfigError, is_panic, tokenizer_panic
from strategies.imports import importing_without_gc
from strategies.small_files import check_files_read_by_libraries, check_no_lfs_pointer, read_json_object
from trainer.model.config import ModelConfig
from trainer.model.files import SafetensorsFiles
from trainer.model.known_shapes import config_of_shape, names_by_hub_id, shape_instead_of_files
from trainer.model.rope import set_positions

HUB_PATTERNS = ("*.safetensors", "*.json", "tokenizer*", "*.txt", "*.model", "*.jinja")
"""Files of a hub model that a run reads."""
LARGEST_DEPTH = 10_000
LARGEST_WIDTH = 1 << 24
DEPTH_SETTINGS = ("num_hidden_layers", "num_local_experts", "num_experts", "n_routed_experts")
WIDTH_SETTINGS = (
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "head_dim",
    "num_attention_heads",
    "num_key_value_heads",
)
"""Sizes that decide what a model takes, each far above those of any model that exists."""
MAX_LAYERS_OF_SHARED_WEIGHTS = 200
"""Layers that a model may have whatever the number of its tensors: ALBERT has one group of weights for all of its layers."""
REQUIRED_SIZES = ("hidden_size", "num_hidden_layers", "vocab_size")
"""What every configuration has, by one name or another, and no model can be without."""


def local_path_or_hub_id(path_or_id: str | None) -> str:
    """A local directory (of a model or a tokenizer) as an absolute path, a hub id as it is. Raises ConfigError for None."""
    if path_or_id is None:
        raise ConfigError("model.path: not set; give a model directory or a hub id, as in model.path=models/smollm2")
    path = Path(path_or_id).expanduser()
    return str(path.resolve()) if path.is_dir() else path_or_id


def _hub_error(setting: str, value: str, error: Exception, *, download: bool) -> ConfigError:
    """Make the ConfigError (returned, not raised) for a model or tokenizer that neither this host nor the hub has.

    `setting`, `value`: what names it, such as "model.path" and its value. `error`: the hub client's. `download`: whether the
    settings allow downloads.
    """
    reason = str(error).splitlines()[0][:160]
    # A run may be exported from another directory than the one that its relative path counts from.
    here = "here" if Path(value).is_absolute() else f"in {Path.cwd()}"
    has_published_shape = value in names_by_hub_id()  # enough for plans
    if download:
        hint = "; leave model.download out to plan with its published shape" if has_published_shape else ""
        return ConfigError(
            f"{setting}={value}: not a model directory {here}, and model.download=true could not fetch it ({reason}); give an "
            f"existing directory, or type the command where the hub can be reached{hint}"
        )
    hint = ""
    if has_published_shape:
        hint = (
            ". Its published shape is enough for plan, submit --print and --dry-run; what you typed needs its weights and its "
            "tokenizer"
        )
    return ConfigError(
        f"{setting}={value}: not a model directory {here} and not loadable from the local hub cache ({reason}). Paths of a "
        "run are relative to where its training was started; give an existing directory, fetch it with shardtune download, or "
        f"set model.download=true{hint}"
    )


def find_weights_directory(config: ModelConfig) -> Path:
    """Find the directory of a model's weights: `model.path` itself, or the hub's local snapshot (fetched with model.download).

    Raises ConfigError if there is neither, also if only the model's published sizes are known (enough for plans).
    """
    path = local_path_or_hub_id(config.path)
    if Path(path).is_dir():
        return Path(path)
    # Published sizes would stand for a missing config.json, which plans may do and training may not: even if the hub's cache
    # has the weights, they are not used.
    if shape_instead_of_files(config) is not None:
        raise _hub_error("model.path", path, FileNotFoundError("no config.json"), download=config.download)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                path,
                revision=config.revision,
                local_files_only=not config.download,
                allow_patterns=[*HUB_PATTERNS],
            )
        )
    except Exception as error:  # the hub client has a dozen error types; all mean that there are no weights
        raise _hub_error("model.path", path, error, download=config.download) from error


def load_model_config(config: ModelConfig) -> Any:
    """Load the transformers configuration of a model, with the positions that the run's settings ask for.

    If the model's files are not on this machine, that of its published shape (its sizes, for plans). Raises ConfigError if
    there is neither, if a size is impossible, or if it needs remote code.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    # Read it.
    path = local_path_or_hub_id(config.path)
    if Path(path).is_dir():
        check_files_read_by_libraries(Path(path))
        _refuse_adapter(Path(path))
    try:
        hf_config = AutoConfig.from_pretrained(
            path,
            revision=config.revision,
            local_files_only=not config.download,
            trust_remote_code=config.trust_remote_code,
        )
    # A value of the wrong type, or that does not go with another, or that names nothing.
    except (StrictDataclassError, ArithmeticError, TypeError, AttributeError, LookupError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"model.path={path}: its config.json cannot be read: {reason[:300]}; mend it there"
        ) from error
    except (OSError, ValueError) as error:
        shape = shape_instead_of_files(config) if isinstance(error, OSError) else None
        if shape is None:
            raise _unreadable_config_error(path, error, download=config.download) from error
        hf_config = config_of_shape(shape)
    # Check its sizes, then set positions.
    text = hf_config.get_text_config()
    below_one = []
    for setting in REQUIRED_SIZES:
        # Architectures name sizes differently: GPT-2's `hidden_size` is `n_embd`.
        name = text.attribute_map.get(setting, setting)
        size = vars(text).get(name)
        if isinstance(size, int) and size < 1:
            below_one.append(f"{name}={size}")
    if below_one:
        raise ConfigError(
            f"model.path={path}: config.json has {', '.join(below_one)}, where at least 1 is needed; mend it there"
        )
    raise_if_config_too_large(hf_config, path)
    set_positions(hf_config, config)
    return hf_config


def raise_if_config_too_large(hf_config: Any, path: str) -> None:
    """Raise ConfigError, before a model is built, if a size in its configuration is far above that of any model.

    `path`: of the model, for the message.
    """
    text = hf_config.get_text_config()
    too_large: list[str] = []
    for names, largest in ((DEPTH_SETTINGS, LARGEST_DEPTH), (WIDTH_SETTINGS, LARGEST_WIDTH)):
        for name in names:
            size = vars(text).get(text.attribute_map.get(name, name))
            if isinstance(size, int) and size > largest:
                too_large.append(f"{name}={size} (at most {largest:,})")
    if too_large:
        raise ConfigError(
            f"model.path={path}: config.json has {', '.join(too_large)}, more than any model has; download it again"
        )


def check_model_files(config: ModelConfig) -> None:
    """Check config.json and the files of weights before hours of preparing data.

    Raises ConfigError for what is wrong with them. Reads the headers of the files. Also asks the kernel to read the rest ahead,
    while data is prepared.
    """
    hf_config = load_model_config(config)
    directory = find_weights_directory(config)
    check_files_read_by_libraries(directory)
    files = SafetensorsFiles(directory)
    try:
        files.open_all()
        num_layers = getattr(hf_config.get_text_config(), "num_hidden_layers", None)
        num_tensors = len(files.names())
        # Every layer has tensors of its own, except in architectures that share them, which have few layers.
        if isinstance(num_layers, int) and num_layers > max(num_tensors, MAX_LAYERS_OF_SHARED_WEIGHTS):
            raise ConfigError(
                f"{directory}: config.json has num_hidden_layers={num_layers}, and the weights are {num_tensors} tensors; "
                "they are not of one model: download it again"
            )
        files.read_ahead()
    finally:
        files.close()


def _refuse_adapter(directory: Path) -> None:
    """Raise ConfigError if the directory of `model.path` holds an adapter alone, since its user meant another setting.

    It may have a config.json all the same: that of its base with the positions of the training.
    """
    weight_files = {file.name for file in directory.glob("*.safetensors")}
    if (directory / "adapter_config.json").is_file() and weight_files <= {"adapter_model.safetensors"}:
        raise ConfigError(
            f"model.path={directory}: is an adapter; give its base as model.path, and this directory as tuning.from to train "
            f"it further, as adapter={directory} to evaluate it, or in model.adapters to merge it into the base"
        )


def _unreadable_config_error(path: str, error: Exception, *, download: bool) -> ConfigError:
    """Make the ConfigError (returned, not raised) for a model whose config.json gave `error`. The first case that holds:

    - its model_type is unknown to transformers.
    - it is a directory: without config.json, or with one that cannot be read.
    - else: neither a directory nor a model of the hub.
    """
    directory = Path(path)
    if "does not recognize this architecture" in str(error):
        import transformers

        unknown = "its model_type"  # a config.json of the hub is not at hand
        if directory.is_dir():
            unknown = f"the model_type {read_json_object(directory / 'config.json').get('model_type')!r}"
        return ConfigError(
            f"model.path={path}: transformers {transformers.__version__} does not know {unknown}; install a newer "
            "transformers, or set model.trust_remote_code=true where the model brings code that you trust"
        )
    if directory.is_dir():
        lacking = (
            "holds no config.json" if not (directory / "config.json").is_file() else "its config.json cannot be read"
        )
        return ConfigError(
            f"model.path={path}: {lacking} ({' '.join(str(error).split())[:160]}); download the model again"
        )
    return _hub_error("model.path", path, error, download=download)


def load_tokenizer(config: ModelConfig) -> Any:
    """Load the fast tokenizer of a model, with added tokens (`model.add_tokens`) and the chosen chat template.

    Its padding token is the end token if it has none. Raises ConfigError if there is none that can be loaded, or if an added
    token is in the vocabulary already.
    """
    with importing_without_gc("transformers"):
        from transformers import AutoTokenizer

    # Load it.
    path = local_path_or_hub_id(config.tokenizer or config.path)
    if Path(path).is_dir():
        check_files_read_by_libraries(Path(path))
    if config.chat_template is not None:
        check_no_lfs_pointer(Path(config.chat_template).expanduser())
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path,
            revision=config.revision,
            local_files_only=not config.download,
            trust_remote_code=config.trust_remote_code,
        )
    except BaseException as error:  # a broken file fails in the tokenizers library, which knows one type, or panics
        if is_panic(error):
            raise tokenizer_panic(error, path) from error
        if not isinstance(error, Exception):
            raise
        if Path(path).is_dir():
            if config.tokenizer is None:
                load_model_config(config)  # which says so where it is the configuration that cannot be read
            raise ConfigError(
                f"{'model.tokenizer' if config.tokenizer else 'model.path'}={path}: holds no tokenizer that can be loaded "
                f"({' '.join(str(error).split())[:160]}); put tokenizer.json and tokenizer_config.json there, or give "
                "model.tokenizer=<directory or hub id>"
            ) from error
        setting = "model.tokenizer" if config.tokenizer else "model.path"
        raise _hub_error(setting, path, error, download=config.download) from error
    if not tokenizer.is_fast:
        raise ConfigError(f"model.tokenizer={path}: has no fast tokenizer (tokenizer.json); convert it first")
    # Change it as the settings say.
    if config.chat_template is not None:
        tokenizer.chat_template = Path(config.chat_template).expanduser().read_text(encoding="utf-8")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    vocabulary = set(tokenizer.get_vocab())
    if present := [token for token in config.add_tokens if token in vocabulary]:
        raise ConfigError(f"model.add_tokens={present}: already in the vocabulary; remove them from the list")
    tokenizer.add_tokens(list(config.add_tokens), special_tokens=True)
    # An export's tokenizer must not cut what the model has room for.
    tokenizer.model_max_length = max(tokenizer.model_max_length, config.positions or 0)
    return tokenizer


def load_generation_config(config: ModelConfig, hf_config: Any, decoder_start: int | None) -> Any:
    """How the model generates (limits, special tokens): by its generation_config.json, as its export will, else by its config.

    `hf_config`: transformers' configuration. `decoder_start`: first token of the decoder, of encoder-decoder models; None for
    others. Raises ConfigError if the file cannot be used.
    """
    from transformers import GenerationConfig

    directory = find_weights_directory(config)
    file = directory / "generation_config.json"
    if file.is_file():
        read_json_object(file)  # whose errors name the file
        try:
            generation = GenerationConfig.from_pretrained(directory)
        except Exception as error:  # of a value that no field takes
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"{file}: cannot be used ({reason}); mend or delete it") from error
    else:
        generation = GenerationConfig.from_model_config(hf_config)
    if decoder_start is not None:
        generation.decoder_start_token_id = decoder_start
    return generation
