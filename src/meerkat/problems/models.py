"""Loading a causal language model and its tokenizer: from a Hugging Face folder, a GGUF file or the hub.

Nothing that comes with a model is run: no code of its own, and no pickled weights, which are code too.

transformers reads GGUF files (https://huggingface.co/docs/transformers/gguf): it dequantises the weights, and makes
config and tokenizer from the file's metadata. From there on the model is like any other.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from meerkat.errors import MeerkatError

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Source:
    """Where a model is, in the terms of transformers' `from_pretrained`."""

    place: str
    """A folder, or a name on the hub."""
    gguf_file: str = ""
    """The GGUF file in the folder; empty for a model with safetensors."""

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of every `from_pretrained`."""
        return {"trust_remote_code": False} | ({"gguf_file": self.gguf_file} if self.gguf_file else {})


def load_model(name: str, device: str = "cpu") -> tuple[nn.Module, Any]:
    """Load a causal LM and its tokenizer, ready for evaluation; weights have the type that they are stored in.

    Args:
        name: a Hugging Face folder, a GGUF file, a folder that holds one, or a name on the hub.

    Raises:
        MeerkatError: there is no such model, or it has no tokenizer or no causal-LM head, or it is one to be run.
    """
    if device.startswith("meta"):
        raise MeerkatError(f"device '{device}': holds no numbers; use --device cpu")
    source = find_model(name)
    try:
        tokenizer = load_tokenizer(source)
        model = load_weights(source)
    except Exception as error:  # the library raises many kinds: its own, safetensors', gguf's, the tokenizers'
        where = "" if Path(name).exists() else "no such folder, and from the hub it "
        cure = "; if the file may not be whole, fetch it again" if source.gguf_file else ""
        raise MeerkatError(
            f"model '{name}': {where}cannot be loaded as a causal language model ({_reason(error)}){cure}"
        ) from None
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise MeerkatError(f"device '{device}': {str(error).splitlines()[0]}; use --device cpu") from None
    model.requires_grad_(False)
    _learn_padding(model)
    if not _is_causal(model.eval(), name):
        raise MeerkatError(f"model '{name}': its tokens see later ones; give a causal language model")
    return model, tokenizer


def _learn_padding(model: nn.Module) -> None:
    """Let the padding token's embedding have a gradient: the same token often begins or ends a text, and moves."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            forward = type(module).forward
            if forward is nn.Embedding.forward or "padding_idx" not in forward.__code__.co_names:
                module.padding_idx = None


def find_model(name: str) -> Source:
    """Where the model of this name is. Whatever is no path is taken for a name on the hub.

    Raises:
        MeerkatError: the path leads to no model, or to several.
    """
    path = Path(name)
    if path.is_file():
        return _gguf_source(name, path)
    if not path.is_dir():
        if path.is_absolute() or name.startswith(".") or name.count("/") > 1 or path.suffix == ".gguf":
            raise MeerkatError(
                f"model '{name}': no such folder; give a folder with config.json, a .gguf file, or a hub name like "
                "org/model"
            )
        return Source(name)
    gguf_files = sorted(file.name for file in path.glob("*.gguf"))
    if gguf_files and not any(path.glob("*.safetensors")):
        if len(gguf_files) > 1:
            raise MeerkatError(f"model '{name}': holds {len(gguf_files)} models ({', '.join(gguf_files)}); name one")
        return _gguf_source(name, path / gguf_files[0])
    if not (path / "config.json").is_file():
        raise MeerkatError(
            f"model '{name}': the folder has no config.json, and no .gguf file; give the folder of a Hugging Face model"
        )
    if not any((path / file).is_file() for file in _TOKENIZERS):
        raise MeerkatError(
            f"model '{name}': the folder has no tokenizer; save it there with tokenizer.save_pretrained()"
        )
    return Source(name)


def _gguf_source(name: str, file: Path) -> Source:
    if file.suffix != ".gguf":
        raise MeerkatError(f"model '{name}': is no .gguf file; give one, the folder of a model, or a hub name")
    require_gguf(name)
    return Source(str(file.parent), file.name)


def require_gguf(name: str) -> None:
    """Raise MeerkatError unless the packages are here that read GGUF files, as the model of this name is."""
    if not (find_spec("gguf") and find_spec("accelerate")):
        raise MeerkatError(
            f"model '{name}': GGUF files need the 'gguf' and 'accelerate' packages; pip install 'meerkat-fl[gguf]'"
        )


def load_tokenizer(source: Source) -> Any:
    """A model's tokenizer. Raises whatever transformers raises."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source.place, **source.options)


def load_weights(source: Source) -> nn.Module:
    """A causal language model; its weights are as they are stored, or float32 where they are dequantised.

    Raises:
        ValueError: there are no weights for a parameter; and whatever transformers raises.
    """
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(
        source.place,
        use_safetensors=True,
        dtype=torch.float32 if source.gguf_file else "auto",
        output_loading_info=True,
        **source.options,
    )
    if missing := min(loading["missing_keys"], default=""):
        raise ValueError(f"no weights for {missing}")
    if source.gguf_file:  # dequantised: nothing is left of what says otherwise, and keeps it from being saved
        model.hf_quantizer = None
        vars(model.config).pop("quantization_config", None)
    loaded: nn.Module = model
    return loaded


def _reason(error: Exception) -> str:
    """Why a model could not be loaded, in one line."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if "trust_remote_code" in reason:
        return "it needs code of its own, which is not run; give a kind of model that transformers knows"
    if "safetensors" in reason and not isinstance(error, SafetensorError):
        return "its weights must be in model.safetensors: pickled ones can hold code; save it with save_pretrained()"
    return reason


@torch.no_grad()
def _is_causal(model: nn.Module, name: str) -> bool:
    """Whether a later token leaves an earlier one's logits alone; encoders such as BERT load as causal models too."""
    ids = torch.tensor([[1, 2], [1, 3]], device=next(model.parameters()).device)
    one, other = model(input_ids=ids).logits[:, 0].float()
    if not (one.isfinite().all() and other.isfinite().all()):
        raise MeerkatError(f"model '{name}': its logits are not finite; are its weights whole? Fetch it again")
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4)
