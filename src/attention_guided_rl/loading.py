"""Loading: from a configuration to a LanguageModel, with one clear line for everything that can go wrong.

Weights come from safetensors only, and no code from a model repository ever runs.
"""

import contextlib
import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from attention_guided_rl.adapter import in_place
from attention_guided_rl.config import ModelConfig
from attention_guided_rl.errors import CheckpointError, ConfigError, CredentialsError, RemoteError, UnsafeError
from attention_guided_rl.guard import first_tensor
from attention_guided_rl.memory import ran_out
from attention_guided_rl.model import LanguageModel
from attention_guided_rl.onednn import use_onednn
from attention_guided_rl.plain_data import parse_json

BUNDLED_MODEL = Path(__file__).parent / "assets" / "tiny-lm"


def load_model(config: ModelConfig, device: torch.device, *, seed: int = 0, offline: bool = False) -> LanguageModel:
    """Load model and tokenizer and prepare the adapter or the frozen copy.

    Raises:
        ConfigError, CredentialsError, RemoteError, UnsafeError: the model cannot be used, with the reason.
        CheckpointError: a weight is not finite.
    """
    tokenizer = load_tokenizer(config, offline=offline)
    source, options = _source(config, offline=offline)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
    with _load_errors(config):
        causal_lm = AutoModelForCausalLM.from_pretrained(source, use_safetensors=True, dtype=dtype, **options)
    if len(tokenizer) > causal_lm.config.get_text_config().vocab_size:
        raise ConfigError(f"model.name: the tokenizer of {config.name!r} has more tokens than the model")
    if bad := first_tensor(causal_lm.named_parameters()):
        file = _file_with(Path(source), bad)
        raise CheckpointError(f"model.name: {config.name!r}: {file}: the tensor {bad} is not finite")
    return prepare(causal_lm.to(device), tokenizer, config, seed=seed)  # type: ignore[arg-type]  # its wrapper


def load_tokenizer(config: ModelConfig, *, offline: bool = False) -> Any:
    """Load the tokenizer alone; errors as for `load_model`."""
    source, options = _source(config, offline=offline)
    with _load_errors(config):
        return AutoTokenizer.from_pretrained(source, **options)


def prepare(causal_lm: Any, tokenizer: Any, config: ModelConfig, *, seed: int = 0) -> LanguageModel:
    """Attach the adapter, or copy the reference, to an already loaded model."""
    causal_lm.eval().requires_grad_(False)
    if config.adapter == "full":
        frozen_copy = copy.deepcopy(causal_lm)
        causal_lm.requires_grad_(True)
        model = LanguageModel(causal_lm, tokenizer, name=config.name, frozen_copy=frozen_copy)
    else:
        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # peft types it int and multiplies it as float
            lora_dropout=config.lora_dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft_model = get_peft_model(causal_lm, in_place(lora))
        use_onednn(peft_model.eval())
        model = LanguageModel(causal_lm, tokenizer, name=config.name, peft_model=peft_model)
    _check_head(model, causal_lm)
    return model


def _source(config: ModelConfig, *, offline: bool) -> tuple[str, dict[str, Any]]:
    """Return what to load and how."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    source = model_source(config, offline=offline)
    hub = (
        {"local_files_only": True}
        if Path(source).is_dir()
        else {"revision": config.revision, "local_files_only": offline}
    )
    return source, {"trust_remote_code": False, **hub}


@contextlib.contextmanager
def _load_errors(config: ModelConfig) -> Iterator[None]:
    try:
        yield
    except (
        *(OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError, SafetensorError),
    ) as error:
        if ran_out(error):
            raise
        raise ConfigError(f"model.name: cannot load {config.name!r}: {_one_line(error)}") from error


def model_source(config: ModelConfig, *, offline: bool = False) -> str:
    """Return the folder or hub name to load from, after checking that it is there, allowed and free of code."""
    if config.name == "tiny":
        return str(BUNDLED_MODEL)
    folder = Path(config.name)
    if folder.is_dir():
        config_file = folder / "config.json"
        if not config_file.is_file():
            raise ConfigError(f"model.name: {config.name!r} is a folder without config.json")
    elif folder.is_absolute() or config.name.startswith(".") or config.name.count("/") > 1:
        raise ConfigError(f"model.name: there is no folder {config.name!r}")
    else:
        config_file = _hub_config(config, offline=offline)
    try:
        contents = parse_json(config_file.read_bytes())
    except (ValueError, OSError) as error:
        raise ConfigError(f"model.name: {config.name!r}: config.json cannot be read: {error}") from None
    if not isinstance(contents, dict):
        raise ConfigError(f"model.name: {config.name!r}: config.json does not describe a model")
    if "quantization_config" in contents:
        raise ConfigError(f"model.name: {config.name!r} is quantised; name the model that it was made from")
    _refuse_other_weights(folder)
    if "auto_map" in contents or _wants_kernel(contents) or _tokenizer_wants_code(folder):
        raise UnsafeError(f"model.name: {config.name!r} wants to run code from its repository; refused")
    return config.name


def max_positions(config: ModelConfig, *, offline: bool = False) -> int:
    """Return the longest row the model can read, from its config alone, before any weights load."""
    source, options = _source(config, offline=offline)
    with _load_errors(config):
        loaded = AutoConfig.from_pretrained(source, **options)
        return int(loaded.get_text_config().max_position_embeddings)


def _refuse_other_weights(folder: Path) -> None:
    """Refuse an index of weights that names what the library would read as a pickle, though asked for safetensors."""
    for path in folder.glob("*.safetensors.index.json"):
        try:
            shards = set(parse_json(path.read_bytes())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # of which the loading proper will complain
        if other := sorted(str(shard) for shard in shards if not str(shard).endswith(".safetensors")):
            raise UnsafeError(f"model.name: {path} names {other[0]!r}, which is no safetensors file; refused")


def _wants_kernel(contents: dict[str, Any]) -> bool:
    """Return whether attention is to be computed by code of another repository."""
    return any("/" in str(value) for key, value in contents.items() if key.endswith("attn_implementation"))


def _tokenizer_wants_code(folder: Path) -> bool:
    try:
        contents = parse_json((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        return False  # no such file, or one that the loading proper will complain about
    return isinstance(contents, dict) and "auto_map" in contents


def _file_with(folder: Path, tensor: str) -> str:
    """Return the name of the file that holds a tensor; large models are in several, listed in an index."""
    try:
        index = parse_json((folder / "model.safetensors.index.json").read_bytes())
        return str(index["weight_map"][tensor])
    except (OSError, ValueError, KeyError, TypeError):
        return "model.safetensors"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _hub_config(config: ModelConfig, *, offline: bool) -> Path:
    """Fetch config.json of a hub model, which tells apart: no such model, no access, no network."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are not news to the reader
    name = config.name
    try:
        return Path(hf_hub_download(name, "config.json", revision=config.revision, local_files_only=offline))
    except GatedRepoError:
        raise CredentialsError(
            f"model.name: {name!r} is gated: accept its licence at https://huggingface.co/{name}, make a token at "
            "https://huggingface.co/settings/tokens, and set HF_TOKEN"
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError, HFValidationError) as error:
        if isinstance(error, LocalEntryNotFoundError):
            why = "--offline allows no connection" if offline else "the hub cannot be reached"
            raise RemoteError(f"model.name: {name!r} is neither a folder nor in the local cache, and {why}") from None
        raise ConfigError(
            f"model.name: no model {name!r} (revision {config.revision or 'newest'}): it is neither a folder here nor "
            "on the hub, or it is private and HF_TOKEN is not set"
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no status"
        if status in (401, 403):
            raise CredentialsError(f"model.name: the hub refuses access to {name!r}; check HF_TOKEN") from None
        raise RemoteError(f"model.name: the hub answered {status} for {name!r}") from None
    except OSError:
        raise RemoteError(f"model.name: {name!r} is not a folder, and the hub cannot be reached") from None


def _check_head(model: LanguageModel, causal_lm: Any) -> None:
    """Refuse a model whose own forward does something to the logits that `LanguageModel` does not."""
    ids = torch.arange(4, device=model.device)[None]
    with torch.no_grad():
        own = causal_lm(input_ids=ids, use_cache=False).logits.float()
        ours = model._logits(model._body(ids, torch.zeros_like(ids), cache=None))
    if not torch.allclose(own, ours, atol=1e-3, rtol=1e-3):
        raise ConfigError(
            f"model.name: {type(causal_lm).__name__} transforms its logits in a way that is not supported"
        )
