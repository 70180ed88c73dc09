"""A Hugging Face checkpoint: open a folder, read it tensor by tensor, write a folder."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import nullcontext, redirect_stderr
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow import stage_dir
from regrow.checkpoint import identity
from regrow.checkpoint.carried import TOKENIZER_FILES, carry
from regrow.checkpoint.model_config import (
    EMBEDDING,
    HEAD,
    accept_config,
    check_generation_config,
    is_tied,
    read_config,
    refuse_quantized,
)
from regrow.checkpoint.multimodal import (
    Multimodal,
    around,
    is_multimodal,
    open_whole,
    read_multimodal,
)
from regrow.checkpoint.shards import DTYPES, PACKED, read_headers, write_shards
from regrow.errors import UserError
from regrow.runtime import distributed

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class Checkpoint:
    """A Hugging Face folder whose tensors are read from safetensors on demand.

    Of a multimodal folder, `config` and the tensors are those of its text model, under the names
    that its own class gives them; `whole` has the rest. Raises UserError for a missing or broken
    file, for a config that transformers refuses, and for models that are not supported: quantized
    ones, pickled ones, and text models without a class.
    """

    def __init__(self, folder: str | Path, quantized: bool = False) -> None:
        """Open a folder; `quantized` also accepts the compressed-tensors format."""
        self.folder = Path(folder)
        self.name = str(folder)  # `load` has the name that the user gave
        self.config = read_config(self.folder)
        # Written folders must not ask for remote code: a class of transformers reads the model.
        self.has_remote_code = self.config.pop("auto_map", None) is not None
        self._open: tuple[str, Any] | None = None
        self._stored_as: dict[str, str] = {}
        self.whole: Multimodal | None = None
        self._other_shards: dict[str, str] = {}
        if is_multimodal(self.config):
            self._read_whole()
        stock = accept_config(self.config, self.folder, quantized)
        check_generation_config(self.folder)
        self.quantized = bool(self.config.get("quantization_config"))
        self.tied = is_tied(self.config, stock)
        if self.whole is None:
            self._shard_of, self._headers = read_headers(self.folder)
        if self.tied:
            self._check_tied()

    def _read_whole(self) -> None:
        """Take the text model of a multimodal folder: its config, and its tensors' own names.

        A head that is stored and differs from the embedding is not tied, as in transformers.
        """
        refuse_quantized(self.config, self.folder)
        shard_of, headers = read_headers(self.folder)
        shapes = {name: tuple(entry["shape"]) for name, entry in headers.items()}
        self.whole = whole = read_multimodal(self.config, shapes, self.folder)
        self._stored_as = dict(whole.disk_names)
        self._shard_of = {name: shard_of[disk] for name, disk in whole.disk_names.items()}
        self._headers = {name: headers[disk] for name, disk in whole.disk_names.items()}
        self._other_shards = {name: shard_of[name] for name in whole.others}
        self._headers |= {name: headers[name] for name in whole.others}
        if whole.text_config["tie_word_embeddings"] and HEAD in self._shard_of:
            same = self.shapes[HEAD] == self.shapes[EMBEDDING]
            if not same or not bool((self.tensor(HEAD) == self.tensor(EMBEDDING)).all()):
                whole.text_config["tie_word_embeddings"] = False
        self.config = dict(whole.text_config)

    def _check_tied(self) -> None:
        """If only the head is stored, use it as the embedding too, as transformers does.

        Raises UserError when head and embedding are both stored and differ.
        """
        if HEAD in self._headers and EMBEDDING not in self._headers:
            self._stored_as[EMBEDDING] = HEAD
            self._shard_of[EMBEDDING] = self._shard_of.pop(HEAD)
            self._headers[EMBEDDING] = self._headers.pop(HEAD)
        elif HEAD in self._headers and EMBEDDING in self._headers:
            same = self.shapes[HEAD] == self.shapes[EMBEDDING]
            if not same or not bool((self.tensor(HEAD) == self.tensor(EMBEDDING)).all()):
                raise UserError(
                    f"{self.folder}: {HEAD} differs from {EMBEDDING}, although config.json ties "
                    "them: set tie_word_embeddings to false there"
                )

    def names(self) -> list[str]:
        """Names of the tensors, in the order of the shards."""
        return list(self._shard_of)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor; no tensor is read."""
        return {name: tuple(self._headers[name]["shape"]) for name in self._shard_of}

    def dtype(self, name: str) -> str:
        """The tensor's dtype as torch spells it, for instance bfloat16."""
        stored = self._headers[name]["dtype"]
        allowed = {**DTYPES, **PACKED} if self.quantized else DTYPES
        if stored not in allowed:
            raise UserError(f"{self.folder}: {name} is stored as {stored}; allowed: {[*allowed]}")
        return allowed[stored]

    def bytes(self, name: str) -> int:
        """Bytes of the tensor on disk."""
        begin, end = self._headers[name]["data_offsets"]
        return int(end - begin)

    def shard_bytes(self) -> int:
        """Bytes of the largest shard."""
        totals: dict[str, int] = {}
        for name, shard in [*self._shard_of.items(), *self._other_shards.items()]:
            totals[shard] = totals.get(shard, 0) + self.bytes(name)
        return max(totals.values())

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor; its shard stays memory-mapped until another shard is read."""
        return self._read(self._shard_of[name], self._stored_as.get(name, name))

    def _read(self, shard: str, stored: str) -> torch.Tensor:
        from safetensors import safe_open

        if self._open is None or self._open[0] != shard:
            self._open = None  # close the old shard first, so that two are never mapped
            self._open = (shard, safe_open(self.folder / shard, framework="pt"))
        tensor: torch.Tensor = self._open[1].get_tensor(stored)
        return tensor

    @cached_property
    def main_dtype(self) -> str:
        """The floating-point dtype with the most bytes; some tensors, such as norms, may differ."""
        totals = dict.fromkeys(DTYPES.values(), 0)
        for name in self.names():
            if (dtype := self.dtype(name)) in totals:
                totals[dtype] += self.bytes(name)
        return max(totals, key=lambda dtype: totals[dtype])

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """The dtype to compute in: `precision.half` for half precision, else the stored dtype."""
        import torch

        from regrow.runtime.precision import half

        if self.main_dtype in ("bfloat16", "float16"):
            return half(device)
        dtype: torch.dtype = getattr(torch, self.main_dtype)
        return dtype

    def meta(self, name: str) -> torch.Tensor:
        """A tensor on the meta device with the same shape and dtype."""
        import torch

        dtype = getattr(torch, self.dtype(name))
        return torch.empty(self.shapes[name], dtype=dtype, device="meta")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the config and of all bytes of the weight files, which are read once.

        Raises UserError when a weight is NaN or infinite.
        """
        config = self.config if self.whole is None else self.whole.config
        total = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for shard in sorted({*self._shard_of.values(), *self._other_shards.values()}):
            shard_identity = identity.of_weights(self.folder / shard)
            if shard_identity.not_finite:
                raise UserError(
                    f"{self.folder}: {shard_identity.not_finite} has values that are NaN or "
                    "infinite: fetch the model again, or use an earlier checkpoint of its training"
                )
            total.update(shard_identity.sha256.encode())
        return total.hexdigest()

    def stock_config(self) -> PretrainedConfig:
        """The config as transformers reads it; of a multimodal folder, that of its text model."""
        from transformers import CONFIG_MAPPING, AutoConfig

        if self.whole is None:
            return AutoConfig.from_pretrained(str(self.folder), local_files_only=True)
        stock: PretrainedConfig = CONFIG_MAPPING[self.config["model_type"]].from_dict(
            {**self.config}
        )
        stock._name_or_path = str(self.folder)
        return stock

    def refuse_multimodal(self, what: str) -> None:
        """Raise UserError for a multimodal folder, with which `what` is not possible."""
        if self.whole is not None:
            raise UserError(f"{self.folder} is multimodal: {what}")

    def others(self) -> dict[str, torch.Tensor]:
        """The tensors of a multimodal folder beside its text model, on the meta device."""
        import torch

        dtypes, found = {**DTYPES, **PACKED}, {}
        for name in self._other_shards:
            entry = self._headers[name]
            dtype = getattr(torch, dtypes[entry["dtype"]])
            found[name] = torch.empty(entry["shape"], dtype=dtype, device="meta")
        return found

    def other(self, name: str) -> torch.Tensor:
        """Read a tensor of a multimodal folder beside its text model."""
        return self._read(self._other_shards[name], name)

    @property
    def outline(self) -> str:
        """SHA-256 of the config and of the weight files' names and sizes, which are not read."""
        files = {name: (self.folder / name).stat().st_size for name in self._shard_of.values()}
        text = json.dumps([self.config, files], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder has a tokenizer."""
        return any((self.folder / name).exists() for name in TOKENIZER_FILES)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The folder's tokenizer; raises UserError when it has none, or a broken one.

        All checkpoints with the same tokenizer files share one object: copy it before changing
        it.
        """
        from regrow.checkpoint.tokenizer_files import read_tokenizer

        if not self.has_tokenizer:
            raise UserError(
                f"no tokenizer in {self.folder}: expected one of {', '.join(TOKENIZER_FILES)}; "
                "copy the parent model's tokenizer files there"
            )
        classes = [self.config.get("model_type"), self.config.get("tokenizer_class")]
        return read_tokenizer(self.folder, classes)

    def model(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> PreTrainedModel:
        """The model in eval mode, loaded by transformers; of a multimodal folder its text model."""
        from transformers import AutoModelForCausalLM

        if self.whole is not None:
            with distributed.hidden_group():
                return self._text_model(dtype).to(device).eval()  # type: ignore[arg-type]
        if self.quantized and importlib.util.find_spec("compressed_tensors") is None:
            raise UserError(
                f"{self.folder} is quantized: pip install 'regrow[quantize]' to open it"
            )
        # compressed-tensors prints progress bars that cannot be switched off.
        silent = redirect_stderr(io.StringIO()) if self.quantized else nullcontext()
        with silent, distributed.hidden_group():
            model: Any = AutoModelForCausalLM.from_pretrained(
                str(self.folder),
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                **experts_option(dtype),
            )
            if self.quantized and not self.config["quantization_config"].get("dequantize"):
                # Do not wait for the first forward pass: the head's weights are read before it.
                model.hf_quantizer.compressor.decompress_model(model)
        loaded: PreTrainedModel = model.to(device).eval()
        return loaded

    def _text_model(self, dtype: torch.dtype) -> PreTrainedModel:
        """The text model of a multimodal folder, in its own class."""
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig

        stock = self.stock_config()
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(stock)]
        model: PreTrainedModel = kind.from_pretrained(
            None,
            config=stock,
            state_dict={name: self.tensor(name).to(dtype, copy=True) for name in self.names()},
            dtype=dtype,
            **experts_option(dtype),
        )
        if (self.folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(str(self.folder))
        return model

    def whole_model(self, dtype: torch.dtype) -> PreTrainedModel:
        """The whole model of a multimodal folder, opened by its stock class."""
        assert self.whole is not None
        return open_whole(self.folder, self.whole.config, dtype)


def experts_option(dtype: torch.dtype) -> dict[str, str]:
    """Loading arguments for experts in `dtype`: transformers cannot compute groups in float64."""
    import torch

    return {"experts_implementation": "eager"} if dtype == torch.float64 else {}


def load(source: str | Path, quantized: bool = False) -> Checkpoint:
    """Open a Hugging Face folder, a hub id, a GGUF file or `package:NAME` (a GGUF in a package).

    `quantized` also accepts a folder in the compressed-tensors format, for evaluation. As long as
    the files of a folder do not change, the same object is returned. Raises UserError, in one line,
    for a model that is missing, broken or not supported.
    """
    from regrow.checkpoint.resolve import resolve_model

    folder = resolve_model(str(source))
    key = (str(folder), folder.absolute())
    stamps = {path.name: identity.stamp(path) for path in folder.iterdir() if path.is_file()}
    if key in _opened and _opened[key][0] == stamps:
        checkpoint = _opened[key][1]
        if quantized or not checkpoint.quantized:
            if str(source) != str(folder):
                checkpoint.name = str(source)
            return checkpoint
    settled = all(map(identity.is_settled, stamps.values()))
    checkpoint = Checkpoint(folder, quantized)
    checkpoint.name = str(source)
    if settled:
        _opened.pop(key, None)
        _opened[key] = stamps, checkpoint
        while len(_opened) > KEPT_OPEN:
            del _opened[next(iter(_opened))]
    return checkpoint


KEPT_OPEN = 8
_opened: dict[tuple[str, Path], tuple[dict[str, identity.Stamp], Checkpoint]] = {}
"""The checkpoints that this process opened most recently, each with the state of its files."""


def save(model: PreTrainedModel, out: str | Path, like: Checkpoint) -> Path:
    """Write a model in memory as a Hugging Face folder, with the tokenizer files of `like`.

    Tied weights are written once. The folder appears only when it is complete. Raises UserError
    when `out` is not a folder, or is not empty.
    """
    stage_dir.refuse_foreign(Path(out))
    out = stage_dir.output_folder(Path(out))
    partial = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write_model(model, partial, like)
        stage_dir.replace_folder(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def write_model(model: PreTrainedModel, folder: Path, like: Checkpoint, whole: bool = True) -> None:
    """Like `save`, but without the rename, for a stage that writes into its own hidden folder.

    If `like` is multimodal and the model is its text model (`whole`), the other tensors of `like`
    are written with it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stage_dir.require_space(folder, sum(p.numel() * p.element_size() for p in model.parameters()))
    model.config.__dict__.pop("auto_map", None)
    if like.whole is None or not whole:
        model.save_pretrained(str(folder), safe_serialization=True)
        carry(like.folder, folder)
        return
    alone = folder / "text_model"
    model.save_pretrained(str(alone), safe_serialization=True)
    text = Checkpoint(alone)
    tensors = ((name, text.tensor(name)) for name in text.names())
    write(folder, text.config, {name: text.meta(name) for name in text.names()}, tensors, like)
    shutil.rmtree(alone)


def write(
    folder: Path,
    config: dict[str, Any],
    layout: Mapping[str, torch.Tensor],
    tensors: Iterable[tuple[str, torch.Tensor]],
    like: Checkpoint | None = None,
    max_shard_bytes: int | None = None,
) -> None:
    """Write a Hugging Face folder from a stream of tensors, with one tensor in memory at a time.

    `layout` maps the names of the stream, in order, to tensors of the same shape and dtype, which
    may be on the meta device. A shard has at most `max_shard_bytes` (by default the size of the
    largest shard of `like`, or 5 GB). Tokenizer, chat template and generation config are copied
    from `like`, and so are the tensors beside the text model if `like` is multimodal.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if like is not None and like.whole is not None:
        config = like.whole.whole_config(config)
        layout, tensors = around(like.whole, layout, tensors, like.others(), like.other)
    limit = max_shard_bytes or (like.shard_bytes() if like else 5_000_000_000)
    write_shards(folder, layout, tensors, limit)
    stage_dir.write_json(folder / "config.json", config)
    if like is not None:
        carry(like.folder, folder)
