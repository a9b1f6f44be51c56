"""Virtual tokens: prompt tuning, P-tuning and prefix tuning, with peft's own encoders and files.

peft puts the tokens before the inputs in its wrapper's forward, which sharded training never calls: an objective asks the
decoder and the head in turn. Here a hook on the decoder does it (`trainer.tuning.prepend`), and the encoder is called as a
module inside that forward pass.

peft 0.21 loses the tokens when it generates with the cache of transformers 5.24 (prefixes also without); its forward pass is
right. To generate from an export, load the base with transformers and call `load(model, directory)`.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from strategies.errors import ConfigError
from strategies.runtime import derived_seed
from strategies.small_files import read_json_object
from trainer.tuning.base import BaseWeightsReader
from trainer.tuning.compat.peft import detach_word_embeddings, peft_tensors_of_fully_trained_modules
from trainer.tuning.config import PrefixConfig, PrefixInit, PromptConfig, PromptInit, VirtualConfig
from trainer.tuning.lstm import EncoderLstm
from trainer.tuning.own_adapters import AddedParameters, is_causal
from trainer.tuning.peft_configs import peft_config_of_virtual_tokens
from trainer.tuning.prepend import PrefixShape, Prepend, cache_argument
from trainer.tuning.replica import ADAPTER

ENCODER_MODULE = f"prompt_encoder.{ADAPTER}"
"""Where peft's wrapper holds the module that makes the virtual tokens."""
INITIAL_KEY_STD = 0.1
"""Standard deviation of the first keys of a prefix that starts at zero: SmolLM2-135M has the same loss as with keys of zero."""


class Virtual(AddedParameters):
    """Trained tokens before every document: as embeddings, or as keys and values of every layer (prefix)."""

    config: VirtualConfig
    wrapper_prefix = "base_model."

    def __init__(
        self,
        config: VirtualConfig,
        *,
        tokenizer: Any = None,
        train_embeddings: bool = False,
        new_heads: tuple[str, ...] = (),
    ) -> None:
        """`config`: settings of prompt, P- or prefix tuning. `tokenizer`: needed for `tuning.init_text`. Changes no model yet.

        `train_embeddings`: the vocabulary grew, which is refused (ConfigError). `new_heads`: names of modules that the base
        checkpoint does not have.
        """
        super().__init__(config, train_embeddings=train_embeddings, new_heads=new_heads)
        self.num_virtual_tokens = config.num_virtual_tokens
        self.is_prefix = isinstance(config, PrefixConfig)
        self.tokenizer = tokenizer
        # What `apply` finds out about the model:
        self._embedding_weight = ""
        """Name of the base's token embeddings."""
        self._vocabulary_size = 0
        self._peft_config: Any = None
        """peft's config."""
        self._encoder_class: Callable[..., nn.Module] = nn.Module
        self._initial_encoder: nn.Module | None = None
        """The encoder with its initial values; its parameters are asked for one by one."""
        self._initial_encoder_seed: int | None = None

    def apply(self, model: nn.Module) -> nn.Module:
        """Add virtual tokens to `model`, on meta: peft's encoder makes them, and hooks of ours put them before each input.

        Returns the PeftModel, which owns the encoder. Raises ConfigError for architectures that cannot read a prefix (keys and
        values from outside).
        """
        decoder = _decoder_of(model)
        self._refuse_unusable_prefix(model, decoder)
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        embeddings_name = next(name for name, module in model.named_modules() if module is embeddings)
        self._embedding_weight = f"{embeddings_name}.weight"
        self._vocabulary_size = embeddings.num_embeddings
        peft_model = self._wrap_in_peft(model, embeddings)
        encoder = peft_model.prompt_encoder[ADAPTER]
        # Its parameters are what this method trains.
        self._take_over_encoder(encoder, peft_model.peft_config[ADAPTER])
        prefix = None
        if self.is_prefix:
            num_heads = self._peft_config.num_attention_heads
            prefix = PrefixShape(num_layers=self._peft_config.num_layers, num_heads=num_heads)
        # The constructor puts the hooks on the decoder, which keep the object alive.
        Prepend(decoder, encoder, embeddings, self.num_virtual_tokens, prefix, is_active=lambda: self.is_active)
        return peft_model

    def _wrap_in_peft(self, model: nn.Module, embeddings: Any) -> Any:
        """Make the PeftModel around `model`, which holds the virtual tokens' encoder, but leaves prepending them to our hook."""
        from peft import get_peft_model

        is_classifier = "SequenceClass" in type(model).__name__
        settings = peft_config_of_virtual_tokens(self.config, "SEQ_CLS" if is_classifier else "CAUSAL_LM")
        if not self.is_prefix:  # peft would look for attribute names that DistilBERT does not have
            settings.token_dim = embeddings.embedding_dim
            settings.num_layers = model.config.num_hidden_layers  # type: ignore[union-attr]
            settings.num_attention_heads = model.config.num_attention_heads  # type: ignore[union-attr]
        settings.modules_to_save = list(self.new_heads) or None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft_model: Any = get_peft_model(model, settings)  # type: ignore[arg-type]
        detach_word_embeddings(peft_model)
        # The hook on the decoder prepends the tokens; peft's wrapper would prepend them a second time.
        peft_model.forward = model.__call__
        if not is_classifier:
            peft_model.generate = model.generate
        return peft_model

    def _take_over_encoder(self, encoder: nn.Module, peft_config: Any) -> None:
        """Remember the encoder's parameters and class: `initial_value` builds another one on the CPU for the initial values."""
        from peft import PEFT_TYPE_TO_TUNER_MAPPING

        self._added_names = {f"{ENCODER_MODULE}.{name}" for name, _ in encoder.named_parameters()}
        self._peft_config = copy.deepcopy(peft_config)
        self._encoder_class = PEFT_TYPE_TO_TUNER_MAPPING[self._peft_config.peft_type]
        for module in encoder.modules():
            if isinstance(module, nn.LSTM):
                # It also computes in half precision on CPUs whose LSTM has no such type.
                module.__class__ = EncoderLstm

    def _refuse_unusable_prefix(self, model: Any, decoder: nn.Module) -> None:
        """Raise ConfigError if prefix tuning, which gives each layer keys and values to read, cannot work in this model.

        - the model takes no keys and values from outside, or is a falcon, whose heads share keys: refused.
        - the attention window is no longer than the prefix: refused.

        Other methods with virtual tokens work everywhere: their tokens stand before the input.
        """
        if not self.is_prefix:
            return
        model_type = model.config.model_type
        if not is_causal(decoder) or cache_argument(decoder) is None:  # its forward pass has no argument for a cache
            raise ConfigError(
                f"tuning=prefix: {model_type} takes no keys and values from outside; use tuning=prompt or tuning=p_tuning"
            )
        if model_type == "falcon":
            raise ConfigError(
                "tuning=prefix: peft makes a prefix for every attention head, and falcon's heads share one set of keys; "
                "use tuning=prompt or tuning=p_tuning"
            )
        # A prefix stands in the window like other keys: the first tokens would fall out of it.
        window_tokens = getattr(model.config, "sliding_window", None)
        if window_tokens is not None and self.num_virtual_tokens >= window_tokens:
            raise ConfigError(
                f"tuning.num_virtual_tokens={self.num_virtual_tokens}: the attention window of this model "
                f"is {window_tokens} tokens "
                f"wide; use at most {window_tokens - 1}, a few dozen as a rule"
            )

    def initial_value(self, name: str, shape: tuple[int, ...], base: BaseWeightsReader, seed: int) -> Tensor:
        """The full initial value of a parameter of the encoder, float32: peft's own value, drawn from (seed, encoder's name).

        `name`: such as `prompt_encoder.default.embedding.weight`. All parameters come from one encoder, which is drawn at the
        first call. `base` reads base weights, at whose embeddings a prompt may start.
        """
        if self._initial_encoder is None or self._initial_encoder_seed != seed:
            self._initial_encoder = self._draw_encoder(base, seed)
            self._initial_encoder_seed = seed
        tensor = self._initial_encoder.get_parameter(name.removeprefix(f"{ENCODER_MODULE}.")).detach()
        assert tuple(tensor.shape) == shape, (name, tensor.shape, shape)
        return tensor

    def _draw_encoder(self, base: BaseWeightsReader, seed: int) -> nn.Module:
        """Build the encoder of the virtual tokens with its initial values, on the CPU, from `seed`: alike on every rank.

        `base` reads the embeddings of the model, at which a prompt may start (`tuning.init`). A prefix that starts at zero gets
        different keys for its tokens.
        """
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.default_generator.manual_seed(derived_seed(seed, ENCODER_MODULE))
            encoder = self._build_encoder()
            if isinstance(self.config, PromptConfig) and self.config.init is not PromptInit.random:
                token_ids = self._initial_token_ids(self.config)
                start_values = base.rows(self._embedding_weight, token_ids)
                encoder.embedding.weight = nn.Parameter(start_values)  # type: ignore[union-attr]
            if isinstance(self.config, PrefixConfig) and self.config.init is PrefixInit.zero:
                self._spread_initial_keys(encoder)
        return encoder

    def _spread_initial_keys(self, encoder: nn.Module) -> None:
        """Give the tokens of a prefix that starts at zero different keys, in `encoder`.

        They add nothing as long as values are zero. Tokens with equal keys would get equal gradients, and stay copies of one
        token. Nothing to do if a network makes the prefix (`tuning.projection`): the network reads a different input for each
        token.
        """
        assert isinstance(self.config, PrefixConfig)
        if self.config.projection:
            return
        weight = cast(Tensor, encoder.embedding.weight).data  # type: ignore[union-attr]
        # peft's layout of a token's row: [layers, keys and values, heads * head_dim]. Index 0 takes the keys.
        keys_and_values = weight.view(self.num_virtual_tokens, self._peft_config.num_layers, 2, -1)
        keys_and_values[:, :, 0].normal_(std=INITIAL_KEY_STD)

    def _build_encoder(self) -> nn.Module:
        """Make peft's encoder for these settings, with random values from torch's default generator."""
        if isinstance(self.config, PromptConfig):
            # peft's class takes word embeddings too, which only a start at a text reads.
            return self._encoder_class(self._peft_config, None)
        return self._encoder_class(self._peft_config)

    def _initial_token_ids(self, config: PromptConfig) -> list[int]:
        """Choose the token id at whose embedding each virtual token starts, as peft does; as many ids as virtual tokens.

        - `tuning.init=sampled`: ids drawn from the whole vocabulary.
        - else: the ids of `tuning.init_text`, with the special tokens that the tokenizer adds, repeated or cut.

        Raises ConfigError if the tokenizer makes no token of `tuning.init_text`.
        """
        if config.init is PromptInit.sampled:
            return torch.randint(0, self._vocabulary_size, (self.num_virtual_tokens,)).tolist()
        assert config.init_text is not None, "checked when the run was composed"
        ids = self.tokenizer(config.init_text)["input_ids"]
        if not ids:
            raise ConfigError(f"tuning.init_text={config.init_text!r}: the tokenizer makes no token of it; use another")
        repeats = math.ceil(self.num_virtual_tokens / len(ids))
        return (ids * repeats)[: self.num_virtual_tokens]

    def save_adapter(
        self, model: Any, trained: dict[str, Tensor], directory: Path, base_name: str, revision: str | None
    ) -> None:
        """Write the trained virtual tokens into `directory` in peft's format: `adapter_model.safetensors` and
        `adapter_config.json`.

        The tensors are the virtual tokens (`prompt_embeddings`), and modules that were trained in full. `trained` holds the
        full trainable tensors under their names in `model`; `base_name` and `revision` say which base the adapter belongs to.
        Raises OSError, SafetensorError.
        """
        from safetensors.torch import save_file

        # peft's files have the encoder's output, not its weights: loaders need no encoder.
        prompt_encoder = self._trained_encoder(trained)
        with torch.no_grad():
            tensors = {"prompt_embeddings": prompt_encoder(torch.arange(self.num_virtual_tokens)[None])[0]}
        tensors |= peft_tensors_of_fully_trained_modules(model, trained, ADAPTER)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, directory / "adapter_model.safetensors", {"format": "pt"})
        peft_config = copy.deepcopy(self._peft_config)
        peft_config.base_model_name_or_path = base_name
        peft_config.revision = revision
        peft_config.inference_mode = True
        peft_config.save_pretrained(str(directory))

    def _trained_encoder(self, trained: dict[str, Tensor]) -> nn.Module:
        """Build the encoder of the virtual tokens with its trained values, in evaluation mode.

        `trained`: tensors by full name.
        """
        encoder = self._build_encoder().eval()
        encoder_state = {}
        for name, tensor in trained.items():
            if name in self._added_names:
                encoder_state[name.removeprefix(f"{ENCODER_MODULE}.")] = tensor
        encoder.load_state_dict(encoder_state)
        return encoder


class _LoadedTokens(nn.Embedding):
    """Virtual tokens of an export beside a model that does not own them: they follow its inputs to their device."""

    def forward(self, tokens: Tensor) -> Tensor:
        if self.weight.device != tokens.device:
            self.to(tokens.device)
        return super().forward(tokens)


def load(model: Any, directory: str | Path) -> Any:
    """Put the exported virtual tokens of `directory` before the inputs of a base model that transformers loaded.

    For users of an export: peft 0.21 loses the tokens when it generates with a cache. Hooks on the decoder put them before each
    input from now on. The model itself is returned; it computes, and generates, what was trained.

    Raises ConfigError if the directory holds an adapter of another method, or one that was trained for another kind of model.
    """
    from safetensors.torch import load_file

    directory = Path(directory)
    settings = read_json_object(directory / "adapter_config.json")
    if settings["peft_type"] not in ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"):
        raise ConfigError(f"{directory}: holds {settings['peft_type']}, not virtual tokens; load it with peft")
    state = load_file(directory / "adapter_model.safetensors")
    embedding_weight = model.get_input_embeddings().weight
    encoder = _LoadedTokens.from_pretrained(state.pop("prompt_embeddings").to(embedding_weight.dtype))
    # What remains are heads that trained in full.
    heads = {name.removeprefix("base_model."): value for name, value in state.items()}
    unknown = model.load_state_dict(heads, strict=False).unexpected_keys
    if unknown:
        raise ConfigError(f"{directory}: was trained for another kind of model: this one has no {unknown[0]}")
    prefix = None
    if settings["peft_type"] == "PREFIX_TUNING":
        prefix = PrefixShape(num_layers=settings["num_layers"], num_heads=settings["num_attention_heads"])
    Prepend(_decoder_of(model), encoder, model.get_input_embeddings(), settings["num_virtual_tokens"], prefix)
    return model


def _decoder_of(model: Any) -> nn.Module:
    """The module below the head: the decoder of a causal model, the base of a classifier."""
    if "SequenceClass" in type(model).__name__:
        return getattr(model, model.base_model_prefix)
    return model.get_decoder()
